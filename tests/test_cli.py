"""The command `lightning-knnmt`: lines in, lines out; mistakes are one sentence."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_knnmt import cli
from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.translator import Translator

ROOT = Path(__file__).parents[1]
HEAVY = {"numpy", "rich", "torch", "yaml", "pytorch_lightning"}


class Finished:
    """What a command that ran in this process left.

    Attributes:
        status: Its exit status.
        output: What it printed.
        errors: What it printed on standard error.
    """

    def __init__(self, status: int, output: bytes, errors: str) -> None:
        self.status, self.output, self.errors = status, output.decode(), errors

    @property
    def lines(self) -> list[str]:
        """The lines that were printed, split at line feeds only."""
        assert not self.output or self.output.endswith("\n")
        return self.output.split("\n")[:-1]


Command = Callable[..., Finished]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """Runs a command in this process: command("translate", SYSTEM, ..., text=b"...")."""

    def call(*arguments: str | Path, text: bytes = b"") -> Finished:
        (tmp_path / "stdin").write_bytes(text)
        with (tmp_path / "stdin").open() as stdin, (tmp_path / "stdout").open("w+b") as stdout:
            monkeypatch.setattr(sys, "stdin", stdin)
            monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stdout, write_through=True))
            status = cli.main([str(each) for each in arguments])
            stdout.seek(0)
            return Finished(status, stdout.read(), capsys.readouterr().err)

    return call


@pytest.fixture
def lines(toy_datamodule: ParallelDataModule) -> list[str]:
    return toy_datamodule.test_corpus.source_lines()[:8]


def as_text(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom lightning_knnmt.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        f"print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip() == "[]"
    for name in ("translate", "explain", "pack", "doctor", "study", "data"):
        assert f"\n    {name} " in done.stdout, name


def test_translating_imports_neither_lightning_nor_the_compiler(
    plain_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").write_text("bade\n")
    code = (
        "import sys\nfrom lightning_knnmt.cli import main\n"
        f"main(['translate', {str(plain_model)!r}, '--input', {str(tmp_path / 'in')!r}])\n"
        "print(sorted({'pytorch_lightning', 'torch._dynamo'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip() == "[]"
    assert done.stdout.count("\n") == 1


def test_a_translation_is_the_translators(
    command: Command, toy_system: Path, lines: list[str]
) -> None:
    expected = [each.text for each in Translator.load(toy_system).translate(lines)]
    done = command("translate", toy_system, text=as_text(lines))
    assert (done.status, done.lines, done.errors) == (0, expected, "")


def test_as_many_lines_come_out_as_go_in(command: Command, plain_model: Path) -> None:
    rng = random.Random(3)
    odd = ["\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\x00", "\t", " ", "♥", ""]
    lines = ["".join(rng.choices([*odd, "bade", "goto "], k=rng.randint(0, 6))) for _ in range(80)]
    done = command("translate", plain_model, text=as_text(lines))
    assert len(done.lines) == len(lines)
    for line, translation in zip(lines, done.lines, strict=True):
        assert len(translation.splitlines()) <= 1
        assert not translation or line.strip()


@pytest.mark.parametrize(
    ("text", "count"),
    [(b"", 0), (b"\n", 1), (b"\n\n", 2), (b"bade", 1), (b"\xef\xbb\xbfbade\r\n", 1)],
)
def test_every_line_feed_ends_a_line_and_the_last_needs_none(
    command: Command, plain_model: Path, text: bytes, count: int
) -> None:
    assert len(command("translate", plain_model, text=text).lines) == count


def test_scores_and_nbest(command: Command, toy_system: Path, lines: list[str]) -> None:
    expected = list(Translator.load(toy_system).translate(lines, beam_size=3, nbest=2))
    text = as_text([*lines, ""])
    done = command("translate", toy_system, "--beam", "3", "--scores", text=text)
    assert done.lines == [*(f"{e.score:.4f}\t{e.text}" for e in expected), "0.0000\t"]
    done = command("translate", toy_system, "--beam", "3", "--nbest", "2", text=text)
    assert done.lines == [
        *(
            f"{number}\t{each.score:.4f}\t{each.text}"
            for number, translation in enumerate(expected, start=1)
            for each in translation.alternatives
        ),
        f"{len(lines) + 1}\t0.0000\t",
    ]


def test_explanations_are_json_lines(command: Command, toy_system: Path, lines: list[str]) -> None:
    done = command("translate", toy_system, "--explain", text=as_text([*lines, ""]))
    explained = [json.loads(line) for line in done.lines]
    assert [each["line"] for each in explained] == list(range(1, len(lines) + 2))
    assert [each["source"] for each in explained] == [*lines, ""]
    assert explained[-1]["tokens"] == []
    (again,) = command("explain", toy_system, lines[0], "--json").lines
    alone = json.loads(again)
    assert alone["text"] == explained[0]["text"]
    assert [each["token"] for each in alone["tokens"]] == [
        each["token"] for each in explained[0]["tokens"]
    ]
    token = explained[0]["tokens"][0]
    shares = [neighbour["share"] for neighbour in token["neighbours"]]
    assert token["nmt_share"] + sum(shares) == pytest.approx(1.0, abs=1e-5)


def test_explain_shows_source_translation_and_training_text(
    command: Command, toy_system: Path, lines: list[str]
) -> None:
    (expected,) = Translator.load(toy_system).translate(lines[:1])
    done = command("explain", toy_system, lines[0])
    assert done.lines[0].strip() == lines[0]
    assert expected.text in done.output


def test_files_in_and_out(
    command: Command, toy_system: Path, lines: list[str], tmp_path: Path
) -> None:
    source, target = tmp_path / "in.xx", tmp_path / "out.yy"
    source.write_bytes(as_text(lines))
    target.write_text("old")
    done = command("translate", toy_system, "--input", source, "--output", target)
    assert (done.status, done.output) == (0, "")
    expected = [each.text for each in Translator.load(toy_system).translate(lines)]
    assert target.read_text() == "".join(f"{text}\n" for text in expected)
    assert not list(tmp_path.glob("*.partial"))


def test_a_failed_translation_keeps_the_old_file_and_the_finished_lines(
    command: Command, plain_model: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.xx", tmp_path / "out.yy"
    source.write_bytes(b"bade\n" * 70 + b"ba\xffde\n")
    target.write_text("old")
    done = command("translate", plain_model, "--input", source, "--output", target)
    assert done.status == 1
    assert target.read_text() == "old"
    assert (tmp_path / "out.yy.partial").read_bytes().count(b"\n") == 64  # the first window
    assert f"{source}, line 71" in done.errors
    assert "0xff" in done.errors
    assert "out.yy.partial" in done.errors


def test_a_packed_file_translates(
    command: Command,
    toy_system: Path,
    lines: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LIGHTNING_KNNMT_CACHE", str(tmp_path / "cache"))
    expected = command("translate", toy_system, text=as_text(lines)).lines
    assert command("pack", toy_system, tmp_path / "toy.knnmt").status == 0
    done = command("translate", tmp_path / "toy.knnmt", text=as_text(lines))
    assert done.lines == expected
    assert str(tmp_path / "cache") in done.errors  # where it was unpacked
    assert command("translate", tmp_path / "toy.knnmt", text=as_text(lines)).errors == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("translate", "nowhere"), "nowhere"),
        (("explain", "nowhere", "bade"), "nowhere"),
        (("pack", "nowhere", "file"), "nowhere"),
        (("translate", "MODEL", "--input", "nowhere"), "nowhere"),
        (("translate", "MODEL", "--output", "no/where"), "no/where"),
        (("translate", "MODEL", "--nbest", "2"), "beam"),
        (("translate", "MODEL", "--beam", "0"), "beam_size is 0"),
        (("translate", "MODEL", "--explain", "--scores"), "--explain"),
        (("translate", "MODEL", "--device", "abacus"), "abacus"),
        (("translate", "MODEL", "--model-option", "source_lang=en"), "source_lang"),
        (("pack", "MODEL", "file"), "train.py"),
    ],
)
def test_a_mistake_is_one_sentence(
    command: Command, plain_model: Path, arguments: tuple[str, ...], named: str
) -> None:
    given = [str(plain_model) if each == "MODEL" else each for each in arguments]
    done = command(*given, text=b"bade\n")
    assert done.status == 1
    assert done.errors.startswith("error: ")
    assert named in done.errors
    assert "Traceback" not in done.errors
    assert done.output == ""


def test_a_wrong_command_line_is_argparses(command: Command) -> None:
    wrong = ("translate", "system", "--model-option", "lang=en")
    for arguments in ((), ("translat",), ("translate",), ("explain", "system"), wrong):
        with pytest.raises(SystemExit) as stopped:
            command(*arguments)
        assert stopped.value.code == 2


@pytest.mark.parametrize("name", ["doctor", "study", "data"])
def test_other_commands_are_handed_over(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["before"])
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert "usage" in capsys.readouterr().out


# --------------------------------------------------------------------- pipes and processes


@pytest.fixture
def pipe() -> Iterator[tuple[io.BufferedReader, io.BufferedWriter]]:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "wb", buffering=0) as writer:
        yield reader, writer  # type: ignore[misc]


def test_what_has_arrived_is_given_at_once(
    pipe: tuple[io.BufferedReader, io.BufferedWriter],
) -> None:
    reader, writer = pipe
    windows = cli.lines_of(reader, iter([3] * 9))
    for text, expected in (
        (b"one\n", ["one"]),
        (b"two\nthree\nfo", ["two", "three"]),
        (b"ur\n", ["four"]),
    ):
        writer.write(text)  # and nothing more: whoever waits for an answer gets one
        assert next(windows) == expected
    writer.write(b"1\n2\n3\n4\n5")
    assert next(windows) == ["1", "2", "3"]
    assert next(windows) == ["4"]
    writer.close()
    assert next(windows) == ["5"]
    assert list(windows) == []


def test_lines_without_an_end_are_rejected(
    pipe: tuple[io.BufferedReader, io.BufferedWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = pipe
    monkeypatch.setattr(cli, "LONGEST_LINE", 1000)

    def write() -> None:
        writer.write(b"short\n" + b"x" * 2000)

    thread = threading.Thread(target=write)
    thread.start()
    with pytest.raises(ValueError, match="line 2"):
        list(cli.lines_of(reader, iter([3] * 9)))
    thread.join()


def start(*arguments: str | Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "lightning_knnmt", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_a_conversation_and_then_a_reader_that_leaves(plain_model: Path) -> None:
    with start("translate", plain_model) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(2):  # an answer comes before the input ends
            process.stdin.write(b"bade goto\n")
            process.stdin.flush()
            assert process.stdout.readline().endswith(b"\n")
        process.stdout.close()  # as `head -2` does
        process.stdin.write(b"bade\n" * 200)
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0


def test_an_interrupted_translation_ends_quietly(plain_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with start("translate", plain_model, "--output", target) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(b"bade\n" * 3)
        process.stdin.flush()
        deadline = time.monotonic() + 100
        while not (tmp_path / "out.partial").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read().decode()
        assert process.wait(60) == 130
    assert "Traceback" not in errors
    assert "out.partial" in errors
    assert not target.exists()
