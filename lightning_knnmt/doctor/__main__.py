"""`lightning-knnmt doctor`: examines a model, a text and, if given, a datastore."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_knnmt.files import default_cache

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from lightning_knnmt.doctor.checks import Finding

LOOKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "problem": ("PROBLEM", "red")}
EPILOG = """\
example:
  lightning-knnmt doctor outputs/NAME/checkpoints/best.ckpt \\
      --data DIR --source de --target en --datastore DATASTORE --temperature 10

Exit status: 0 without problems (there may be warnings), 1 with a problem, 2 for a mistake in the
command line.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="lightning-knnmt doctor",
        description="Checks whether a model, a text and a datastore fit together: languages, "
        "tokenisation, keys, temperature, memory. Changes nothing.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("model", type=Path, help="a checkpoint or a pretrained model, as for model.path")
    add("--data", type=Path, required=True, metavar="DIR",
        help="folder of {train,valid}.LANG, or a fairseq data-bin")  # fmt: skip
    add("--source", required=True, metavar="LANG", help="ending of the source files")
    add("--target", required=True, metavar="LANG", help="ending of the target files")
    add("--datastore", type=Path, metavar="DIR",
        help="datastore to examine (default: a small one is made in memory)")  # fmt: skip
    add("--temperature", type=float, metavar="T", help="temperature to judge")
    add("--sentences", type=int, default=100, metavar="N",
        help="validation sentences to look at (default: %(default)s)")  # fmt: skip
    add("--max-length", type=int, default=256, metavar="N",
        help="data.max_length of the datastore (default: %(default)s)")  # fmt: skip
    add("--model-option", action="append", default=[], metavar="KEY=VALUE",
        help="a setting of the group model, such as source_lang=en; may be repeated")  # fmt: skip
    add("--device", default="cpu", help="where the model runs (default: %(default)s)")
    add("--cache", type=Path, default=default_cache(), metavar="DIR",
        help="where encoded text and datastores are kept (default: %(default)s)")  # fmt: skip
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; a user's mistake ends in one sentence.

    Args:
        arguments: Without the program's name; None for the process's own.

    Returns:
        The exit status.
    """
    made = parser()
    options = made.parse_args(arguments)
    # Heavy imports come after the command line, so that --help is fast.
    from inspect import signature

    from rich.console import Console

    from lightning_knnmt.pretrained import load_pretrained
    from lightning_knnmt.terminal import explanation, quieten_libraries

    settings = {}
    known = list(signature(load_pretrained).parameters)[1:]
    for text in options.model_option:
        key, equals, settings[key] = text.partition("=")
        if not equals or key not in known:
            made.error(f"--model-option {text!r}: give KEY=VALUE with a KEY of {', '.join(known)}")
    quieten_libraries()
    try:
        return 0 if examine(options, settings, Console()) else 1
    except Exception as error:
        sys.exit(explanation(error) or 1)


def examine(options: argparse.Namespace, settings: dict[str, str], console: Console) -> bool:
    """Prints the findings as they come; returns whether there is no problem."""
    from lightning_knnmt.data import ParallelDataModule
    from lightning_knnmt.doctor.examination import Examination
    from lightning_knnmt.pretrained import load_pretrained
    from lightning_knnmt.retrieval import Datastore

    model, tokenizer = load_pretrained(options.model, **settings)
    datamodule = ParallelDataModule(
        options.data,
        options.source,
        options.target,
        cache_dir=options.cache,
        tokenizer=tokenizer,
        max_length=options.max_length,
    )
    examination = Examination(
        model.to(options.device),
        tokenizer,
        datamodule,
        datastore=None if options.datastore is None else Datastore.open(options.datastore),
        sentences=options.sentences,
        temperature=options.temperature,
        directory=options.cache,
    )
    findings = []
    for finding in examination.findings():
        console.print(line_of(finding), soft_wrap=True)
        findings.append(finding)
    counts = {verdict: sum(each.verdict == verdict for each in findings) for verdict in LOOKS}
    problems, warnings = counts["problem"], counts["warning"]
    console.print(f"\n{problems} problems, {warnings} warnings, {counts['ok']} checks passed.")
    return problems == 0


def line_of(finding: Finding) -> Text:
    """A finding as a line for the terminal."""
    from rich.text import Text

    word, colour = LOOKS[finding.verdict]
    text = finding.text[0].upper() + finding.text[1:]
    return Text.assemble((f"{word:8}", colour), (f"{finding.name:16}", "bold"), text)


if __name__ == "__main__":
    sys.exit(main())
