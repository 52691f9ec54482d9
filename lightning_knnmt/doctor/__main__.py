"""``python -m lightning_knnmt.doctor``: examines a model, a text and perhaps a datastore."""

from __future__ import annotations

import argparse
import sys
from inspect import signature
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.doctor.checks import Finding
from lightning_knnmt.doctor.examination import Examination
from lightning_knnmt.files import default_cache
from lightning_knnmt.pretrained import load_pretrained
from lightning_knnmt.retrieval import Datastore
from lightning_knnmt.terminal import explanation, quieten_libraries

LOOKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "problem": ("PROBLEM", "red")}
EPILOG = """\
example:
  python -m lightning_knnmt.doctor outputs/NAME/checkpoints/best.ckpt \\
      --data DIR --source de --target en --datastore DATASTORE --temperature 10

Exit status: 0 if all is well or there are warnings only, 1 if there is a problem.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m lightning_knnmt.doctor",
        description="Says in plain words whether a model, a text and a datastore fit together: "
        "languages, tokenisation, keys, temperature, memory. Changes nothing.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("model", type=Path, help="a checkpoint of ours or somebody else's model, as model.path")
    add("--data", type=Path, required=True, metavar="DIR",
        help="folder of {train,valid}.LANG, or a fairseq data-bin")  # fmt: skip
    add("--source", required=True, metavar="LANG", help="ending of the source files")
    add("--target", required=True, metavar="LANG", help="ending of the target files")
    add("--datastore", type=Path, metavar="DIR",
        help="a datastore to examine (default: a small one is made in memory)")  # fmt: skip
    add("--temperature", type=float, metavar="T", help="a temperature to judge")
    add("--sentences", type=int, default=100, metavar="N",
        help="validation sentences to look at (default: %(default)s)")  # fmt: skip
    add("--max-length", type=int, default=256, metavar="N",
        help="data.max_length of the datastore (default: %(default)s)")  # fmt: skip
    add("--model-option", type=_model_option, action="append", default=[], metavar="KEY=VALUE",
        help="a setting of the group model, such as source_lang=en; may be repeated")  # fmt: skip
    add("--device", default="cpu", help="where the model runs (default: %(default)s)")
    add("--cache", type=Path, default=default_cache(), metavar="DIR",
        help="where encoded text and datastores are kept (default: %(default)s)")  # fmt: skip
    return made


def _model_option(text: str) -> tuple[str, str]:
    """A keyword of `load_pretrained` and its value."""
    key, equals, value = text.partition("=")
    known = list(signature(load_pretrained).parameters)[1:]
    if not equals or key not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE with a KEY of {known}")
    return key, value


def examine(options: argparse.Namespace, console: Console) -> bool:
    """Prints the findings as they come; returns whether there is no problem."""
    model, tokenizer = load_pretrained(options.model, **dict(options.model_option))
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
    word, colour = LOOKS[finding.verdict]
    text = finding.text[0].upper() + finding.text[1:]
    return Text.assemble((f"{word:8}", colour), (f"{finding.name:16}", "bold"), text)


def main() -> None:
    """Reads the command line; a user's mistake ends in one sentence."""
    options = parser().parse_args()
    quieten_libraries()
    try:
        is_well = examine(options, Console())
    except Exception as error:
        sys.exit(explanation(error) or 1)
    sys.exit(0 if is_well else 1)


if __name__ == "__main__":
    main()
