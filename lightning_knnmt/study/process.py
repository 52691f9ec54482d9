"""One run of a study: a process of `train.py`, its files, and its cost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_knnmt.evaluation.results import RESULTS_NAME, read_results
from lightning_knnmt.files import locked, write_atomically
from lightning_knnmt.study.plan import Run, StudyError

COST_NAME, USAGE_NAME, OUTPUT_NAME = "training.json", "run.json", "output.txt"
BEST = "checkpoints/best.ckpt"
HYDRA_HINT = "Set the environment variable HYDRA_FULL_ERROR=1"


class RunFailedError(StudyError):
    """A process ended without its results."""


@dataclass(frozen=True)
class Usage:
    """What a finished process took; kept beside its results.

    Attributes:
        command: To type at the repository's root.
        seconds: Elapsed time.
        cpu_seconds: Processor time.
        peak_memory_bytes: The largest resident set.
    """

    command: str
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int


def is_finished(run: Run) -> bool:
    """Whether the run's folder has all its results."""
    if run.test_sets is None:
        return (run.directory / COST_NAME).exists()
    if not (run.directory / RESULTS_NAME).exists():
        return False
    tested = {row.test_set for row in read_results(run.directory)}
    return len(tested) == 1 + len(run.test_sets)


def read_usage(run: Run) -> Usage | None:
    """What the run took; None if its study ended before it."""
    path = run.directory / USAGE_NAME
    return Usage(**json.loads(path.read_text())) if path.exists() else None


def carry_out(
    run: Run,
    train: Path,
    environment: Mapping[str, str],
    processes: set[int],
    report: Callable[[str], None],
) -> None:
    """Starts a run that is not finished, and waits for it.

    If the process of an earlier study is still at it, this waits for that one instead.

    Args:
        run: What to run.
        train: The script.
        environment: Variables of the process, in addition to this one's.
        processes: Has the process's id while it runs, so that it can be stopped.
        report: Takes a message if there is another process to wait for.

    Raises:
        RunFailedError: With the reason that the process printed.
    """
    run.directory.mkdir(parents=True, exist_ok=True)
    waiting = (
        f"{run.label}: waiting for the process that an earlier study left running in "
        f"{run.directory}"
    )
    with locked(run.directory, waiting=lambda: report(waiting)) as lock:
        if is_finished(run):
            return
        arguments = [*run.overrides, f"hydra.run.dir={run.directory.resolve()}", "resume=true"]
        command = " ".join(["python", train.name, *arguments])
        output = run.directory / OUTPUT_NAME
        started = time.perf_counter()
        said_before = output.stat().st_size if output.exists() else 0
        with output.open("ab") as file:
            file.write(f"$ {command}\n".encode())
            file.flush()
            process = subprocess.Popen(
                [sys.executable, str(train), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(environment),
                pass_fds=[lock],  # the process holds the lock as long as it lives
            )
        processes.add(process.pid)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            processes.discard(process.pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0 or not is_finished(run):
            raise RunFailedError(
                f"{run.label} failed ({_ending(process.returncode)}): "
                f"{_reason(output, said_before)} Its whole output is in {output}."
            )
        kibibyte = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        took = Usage(
            command=command,
            seconds=time.perf_counter() - started,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_memory_bytes=usage.ru_maxrss * kibibyte,
        )
        write_atomically(run.directory / USAGE_NAME, json.dumps(asdict(took), indent=2) + "\n")


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    hint = ", which the system sends if memory runs out" if status == -signal.SIGKILL else ""
    return f"ended by {signal.Signals(-status).name}{hint}"


def _reason(output: Path, start: int) -> str:
    """The line that says why a process failed.

    Args:
        output: What it printed.
        start: The byte at which the output of this attempt begins.
    """
    printed = output.read_bytes()[start:].decode(errors="replace")
    lines = [line for line in printed.splitlines() if not line.startswith("$ ")]
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    hints = [number for number, line in enumerate(lines) if HYDRA_HINT in line]
    if hints:  # the paragraph above begins with the reason
        lines = "\n".join(lines[: hints[-1]]).rstrip("\n").rpartition("\n\n")[2].splitlines()
        return lines[0] if lines else HYDRA_HINT
    said = [line for line in lines if line.strip()]
    return said[-1] if said else "it printed nothing."
