"""The command `lightning-knnmt`. Nothing heavy is imported before a subcommand runs."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lightning_knnmt import __version__

if TYPE_CHECKING:
    from lightning_knnmt.translator import Translation, Translator

PROG = "lightning-knnmt"
CHUNK = 1 << 16  # bytes read at a time
LONGEST_LINE = 1 << 24  # bytes; input without line breaks must not fill the memory
WINDOW_BYTES = 1 << 22  # after which lines are translated, however few
# Commands that stand on their own: each module has a `main` that reads sys.argv.
MODULES = {
    "doctor": ("lightning_knnmt.doctor.__main__", "check that model, text and datastore fit"),
    "study": ("lightning_knnmt.study.__main__", "run methods on domains and write a report"),
    "data": ("lightning_knnmt.data.__main__", "list and download named corpora and models"),
}
MODEL_OPTIONS = ("adapters", "source_lang", "target_lang", "data_bin", "text")
TRANSLATE = """\
Translate lines of UTF-8 text, from standard input to standard output.

One line in, one line out, in the same order. Lines end at line feeds only. An empty line stays
empty, and so does a line without any character that the model knows. A line that is too long is
translated in parts, which standard error mentions."""
TRANSLATE_OUTPUT = """\
output:
  by default         TEXT
  --scores           SCORE <tab> TEXT
  --nbest N          LINE <tab> SCORE <tab> TEXT, up to N lines for each input line, best first
  --explain          one JSON object for each line, as `lightning-knnmt explain --json` prints

  SCORE is the log-probability divided by length ** length_penalty; LINE counts from 1.
  With --output, translations are written to FILE.partial, which becomes FILE at the end: after an
  interruption FILE is unchanged and FILE.partial holds the lines that were finished. An interrupted
  translation cannot be resumed.

examples:
  echo "Tipo de pele 2" | lightning-knnmt translate outputs/demo
  lightning-knnmt translate outputs/demo --input news.pt --output news.en --beam 4
"""


EXPLAIN = """\
Translate a sentence and show, for each word, the probability that the model gave it (p_NMT), the
weight of retrieval (λ), the probability that the neighbours gave it (p_kNN), and retrieval's share
in the result. Then come the words that retrieval decided (share above 67 %), with the training text
they come from: each percentage is the share of the probability that a pair brought, and [brackets]
mark the words that were found there."""
EXPLAIN_JSON = """\
JSON (--json here, --explain in `translate`): one object for each line, with
  line, source, text, score
  tokens    for each token of the translation
      token, span            its text (empty: end of sentence), and [start, end] in `text`
      p, p_nmt, p_knn        probabilities; p = (1 - lambda) p_nmt + lambda p_knn
      lambda                 the weight of retrieval
      nmt_share              the model's part of p
      neighbours             nearest first; nmt_share and their shares add up to 1
          entry, sentence    row in the datastore, and the pair of sentences it comes from
          token, distance    the token stored there, and how far its key is
          share              its part of p; 0 if it holds another token
          span               [start, end] of the token in the pair's target, or null if unknown
  pairs     source and target of each pair named above, by number

example:
  lightning-knnmt explain outputs/demo "Tipo de pele 2"
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog=PROG,
        description="Translate with an adapted system, and see why it translates as it does.",
        epilog=f"`{PROG} COMMAND --help` explains a command. Systems are made by train.py and "
        "evaluate.py.",
    )
    made.add_argument("-V", "--version", action="version", version=f"%(prog)s {__version__}")
    commands = made.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_translate(commands)
    _add_explain(commands)
    _add_pack(commands)
    for name, (_, summary) in MODULES.items():
        commands.add_parser(name, help=summary, add_help=False)
    return made


def _add_translate(commands: Any) -> None:
    command = commands.add_parser(
        "translate",
        help="translate lines of text",
        description=TRANSLATE,
        epilog=TRANSLATE_OUTPUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    _add_system(add)
    add("--input", type=Path, metavar="FILE", help="text to translate (default: standard input)")
    add("--output", type=Path, metavar="FILE",
        help="where translations go (default: standard output)")  # fmt: skip
    add("--nbest", type=int, metavar="N", help="print the N best translations, at most --beam")
    add("--scores", action="store_true", help="print the score before each translation")
    add("--explain", action="store_true", help="print JSON: what each token was decided by")
    command.set_defaults(run=translate)


def _add_system(add: Callable[..., object]) -> None:
    """What translate and explain have in common."""
    add("system", metavar="SYSTEM", help="a run's folder (outputs/NAME), a packed file, or a model "
        "of any supported format")  # fmt: skip
    add("--beam", type=int, metavar="N", help="beam size (default: the system's own; 1 is greedy)")
    add("--device", default="cpu", help="where the model computes (default: %(default)s)")
    add("--model-option", type=_key_and_value, action="append", default=[], metavar="KEY=VALUE",
        help="for a model that is no system: source_lang=en and the like; may be "
        "repeated")  # fmt: skip


def _key_and_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or key not in MODEL_OPTIONS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not KEY=VALUE with a KEY of {', '.join(MODEL_OPTIONS)}"
        )
    return key, value


def _add_explain(commands: Any) -> None:
    command = commands.add_parser(
        "explain",
        help="show what decided each word of a translation",
        description=EXPLAIN,
        epilog=EXPLAIN_JSON,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    _add_system(add)
    add("sentences", metavar="SENTENCE", nargs="+", help="what to translate, in quotation marks")
    add("--json", action="store_true", help="print JSON: every token, with all its neighbours")
    command.set_defaults(run=explain)


def _add_pack(commands: Any) -> None:
    command = commands.add_parser(
        "pack",
        help="write a system into one file",
        description="Write a system into one file that translates on other machines: model, "
        "tokenizer, adapters, datastore, index and combiner. The datastore holds its training "
        "text, so the file does too.",
    )
    command.add_argument("system", metavar="SYSTEM", help="a run's folder (outputs/NAME)")
    command.add_argument("file", metavar="FILE", type=Path, help="for example demo.knnmt")
    command.set_defaults(run=pack)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Without the program's name; None for the process's own.

    Returns:
        The exit status: 0, 1 for a mistake in what a command was given, 2 for one in the command
        line, 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in MODULES:
        return _hand_over(given[0], given[1:])
    options = parser().parse_args(given)
    # Threads that wait for each other by spinning slow a busy machine down. Read by torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lightning_knnmt.terminal import explanation, keep_freed_memory

    keep_freed_memory()
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("lightning_knnmt").setLevel(logging.INFO)
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        run(options)
    except BrokenPipeError:  # whoever read the output has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        print(explanation(error), file=sys.stderr)
        return 1
    return 0


def _hand_over(name: str, arguments: list[str]) -> int:
    """Runs a module's own `main`, as if it had been started by itself."""
    sys.argv = [f"{PROG} {name}", *arguments]
    status: int | None = importlib.import_module(MODULES[name][0]).main()
    return status or 0


# ------------------------------------------------------------------------ translate


def translate(options: argparse.Namespace) -> None:
    """Translates what comes in."""
    from lightning_knnmt.translator import window_sizes

    if options.explain and (options.scores or options.nbest):
        raise ValueError("--explain prints JSON, scores included: leave out --scores and --nbest.")
    translator = _translator(options)
    with ExitStack() as stack:
        source = sys.stdin.buffer
        if options.input is not None:
            source = stack.enter_context(options.input.open("rb"))
        elif sys.stdin.isatty():
            print("Type a line and press Enter; Ctrl-D ends.", file=sys.stderr)
        sizes = window_sizes(translator.window)
        translations = translator.translate_windows(
            lines_of(source, sizes, options.input),
            beam_size=options.beam,
            nbest=1 if options.nbest is None else options.nbest,
            explain=options.explain,
        )
        write = stack.enter_context(_output(options.output))
        advance = stack.enter_context(_progress(options))
        for number, translation in enumerate(translations, start=1):
            write(_printed(number, translation, options))
            advance()


def explain(options: argparse.Namespace) -> None:
    """Prints what decided the translations of some sentences."""
    from rich.console import Console

    from lightning_knnmt.explanation_view import view

    translator = _translator(options)
    translations = translator.translate(options.sentences, beam_size=options.beam, explain=True)
    console = Console(highlight=False, soft_wrap=False)
    for number, translation in enumerate(translations, start=1):
        if options.json:
            print(_as_json(number, translation), flush=True)
            continue
        assert translation.explanation is not None, "it was asked for"
        if number > 1:
            console.print()
        console.print(view(translation.source, translation.explanation))


def pack(options: argparse.Namespace) -> None:
    """Writes a system into one file."""
    from lightning_knnmt.system import System

    System.load(options.system).pack(options.file)
    print(f"{options.file}: {options.file.stat().st_size / 1e6:.1f} MB", file=sys.stderr)


def _translator(options: argparse.Namespace) -> Translator:
    import torch

    from lightning_knnmt.translator import Translator

    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:  # no such device, or torch is built without it
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {options.device} cannot be used ({reason}): try cpu."
        ) from error
    model_options = dict(options.model_option)
    return Translator.load(options.system, device=options.device, model_options=model_options)


def _printed(number: int, translation: Translation, options: argparse.Namespace) -> str:
    """The lines that a translation is printed as."""
    if options.explain:
        return f"{_as_json(number, translation)}\n"
    if options.nbest is not None:
        some = translation.alternatives
        return "".join(f"{number}\t{each.score:.4f}\t{each.text}\n" for each in some)
    score = f"{translation.score:.4f}\t" if options.scores else ""
    return f"{score}{translation.text}\n"


def _as_json(number: int, translation: Translation) -> str:
    assert translation.explanation is not None, "it was asked for"
    about = {"source": translation.source, "text": translation.text, "score": translation.score}
    content = {"line": number, **about, **translation.explanation.to_dict()}
    text: str = json.dumps(content, ensure_ascii=False)
    return text


@contextmanager
def _output(path: Path | None) -> Iterator[Callable[[str], object]]:
    """A function that writes text: to standard output, or to a file that is replaced at the end."""
    if path is None:
        output = sys.stdout.buffer
        yield lambda text: (output.write(text.encode()), output.flush())
        return
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        try:
            yield lambda text: file.write(text.encode())
        except BaseException:
            print(f"Stopped: {partial} holds the lines that were finished.", file=sys.stderr)
            raise
    partial.replace(path)


@contextmanager
def _progress(options: argparse.Namespace) -> Iterator[Callable[[], object]]:
    """A function that counts a line; a person sees how many, if they are not printed anyway."""
    if not sys.stderr.isatty() or (options.output is None and sys.stdout.isatty()):
        yield lambda: None
        return
    from tqdm import tqdm

    total = None
    if options.input is not None and options.input.is_file():
        with options.input.open("rb") as file:
            total = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 22), b""))
    with tqdm(total=total, unit=" lines", dynamic_ncols=True) as bar:
        yield bar.update


def lines_of(file: BinaryIO, sizes: Iterator[int], path: Path | None = None) -> Iterator[list[str]]:
    """Groups of lines as they arrive: whatever is there, but at most so many.

    So a person who types gets an answer to every line, a slow program one to what it has written so
    far, and a file is read in large groups.

    Args:
        file: UTF-8 text; its descriptor is read.
        sizes: The most lines of each group.
        path: Its name, for errors; None for standard input.

    Raises:
        ValueError: At a line that is not UTF-8, or has no end.
    """
    name = "standard input" if path is None else str(path)
    descriptor = file.fileno()
    lines: list[bytes] = []
    unfinished, done = b"", 0
    size, num_bytes = next(sizes), 0
    while chunk := os.read(descriptor, CHUNK):
        *ended, unfinished = (unfinished + chunk).split(b"\n")
        lines += ended
        num_bytes += len(chunk)
        while len(lines) >= size or (
            lines and (num_bytes > WINDOW_BYTES or not _is_ready(descriptor))
        ):
            window, lines = lines[:size], lines[size:]
            yield _decoded(window, done, name)
            done += len(window)
            size, num_bytes = next(sizes), 0
        if len(unfinished) > LONGEST_LINE:
            raise ValueError(
                f"{name}, line {done + len(lines) + 1} has more than {LONGEST_LINE:,} bytes and no "
                "end: lines of text end in line feeds."
            )
    if unfinished:
        lines.append(unfinished)
    if lines:
        yield _decoded(lines, done, name)


def _is_ready(descriptor: int) -> bool:
    """Whether there is something to read at once, were it the end."""
    return bool(select.select([descriptor], [], [], 0)[0])


def _decoded(lines: list[bytes], done: int, name: str) -> list[str]:
    decoded = []
    for number, raw in enumerate(lines, start=done + 1):
        try:
            decoded.append(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}, line {number}: byte {error.start + 1} (0x{raw[error.start]:02x}) is not "
                "UTF-8: convert the text first, for example with `iconv -f latin1 -t utf-8`."
            ) from None
    return decoded
