"""Carries out a study: runs what is not finished, reports what failed and continues."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from lightning_knnmt.study.plan import Method, Run, Study, StudyError, inputs_digest, new_run
from lightning_knnmt.study.process import (
    BEST,
    COST_NAME,
    OUTPUT_NAME,
    RunFailedError,
    carry_out,
    is_finished,
    read_usage,
)

TRAIN = Path(__file__).parents[2] / "train.py"
Report = Callable[[str], None]


def say(line: str) -> None:
    """Prints a line at once, so that a log file can be followed."""
    print(line, flush=True)


class Runner:
    """Runs a study, one or more processes at a time.

    Attributes:
        runs: Finished runs, now or before, by domain and method.
        chosen: The values that pilots chose, as overrides.
        failures: The message of each failed run.
    """

    def __init__(
        self,
        study: Study,
        root: Path,
        *,
        jobs: int = 1,
        train: Path | None = None,
        report: Report = say,
    ) -> None:
        """
        Args:
            study: What to run.
            root: The study's folder; runs have folders below it.
            jobs: Processes at a time; they share the processor's cores.
            train: The script; None for this checkout's train.py.
            report: Takes messages.
        """
        train = train or TRAIN
        if jobs < 1:
            raise StudyError(f"--jobs is {jobs}, but at least 1 process is needed.")
        if not train.exists():
            raise StudyError(f"There is no {train}: run studies in a checkout of the repository.")
        self.study = study
        self.root = root
        self.jobs = jobs
        self.train = train
        self.report = report
        self.runs: dict[tuple[str, str], Run] = {}
        self.chosen: dict[tuple[str, str], tuple[str, ...]] = {}
        self.failures: list[str] = []
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        self._inputs = {domain: inputs_digest(study, domain) for domain in study.domains}
        self._environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
        self._processes: set[int] = set()
        self._locks: dict[Path, threading.Lock] = {}
        self._seconds: dict[str, list[float]] = {}  # of finished cells, by method
        self._told: set[tuple[str, str]] = set()
        self._running: dict[str, float] = {}  # when each run's process was started, by label
        self._stopped = False

    def run(self, start: bool = True) -> None:
        """Fills every empty cell of the table.

        Args:
            start: Whether to start processes; if not, cells that are not finished have failed.
        """
        self._stopped = not start
        cells = [(domain, method) for method in self.study.methods for domain in self.study.domains]
        futures: dict[tuple[str, str], Future[None]] = {}
        # Cells start in this order, so those that a cell needs have started before it.
        with ThreadPoolExecutor(self.jobs) as pool:
            for cell in cells:
                futures[cell] = pool.submit(self._fill, *cell, futures)
            names = {future: cell for cell, future in futures.items()}
            try:
                for number, future in enumerate(as_completed(names), start=1):
                    self._tell(names[future], future, number, cells)
            except BaseException:  # otherwise the pool would first finish what is waiting
                self._stopped = True
                for pid in list(self._processes):
                    os.kill(pid, signal.SIGTERM)
                pool.shutdown(cancel_futures=True)
                raise

    def status(self) -> str:
        """What runs at the moment, and since when."""
        cells = len(self.study.methods) * len(self.study.domains)
        now = time.perf_counter()
        running = [f"  {label}: {minutes(now - at)}" for label, at in [*self._running.items()]]
        return "\n".join([f"{len(self._told)} of {cells} finished; running:", *running])

    def _fill(self, domain: str, name: str, futures: dict[tuple[str, str], Future[None]]) -> None:
        started = time.perf_counter()
        method = self.study.methods[name]
        for needed in (method.model_of, method.choices_of):
            if needed and futures[domain, needed].exception() is not None:
                raise RunFailedError(f"{domain} · {name} was skipped: it needs {needed}.")
        pilots_of = self.study.methods[method.choices_of or name]
        choices = self.choices(self.study.choose_on or domain, pilots_of)
        self.chosen[domain, name] = choices
        run = self._plan(domain, method, choices)
        was_finished = is_finished(run)
        self._carry_out(run)
        self.runs[domain, name] = run
        if not was_finished:
            self._seconds.setdefault(name, []).append(time.perf_counter() - started)

    def choices(self, domain: str, method: Method) -> tuple[str, ...]:
        """The trial with the lowest validation loss, as overrides; failed trials are left out."""
        losses: dict[tuple[str, ...], float] = {}
        reason = "it was not started."
        for trial in method.trials():
            pilot = self._plan(domain, method, trial, is_pilot=True)
            try:
                self._carry_out(pilot)
            except RunFailedError as error:  # such as a learning rate that diverges
                reason = str(error)
                self.report(reason)
                continue
            loss = json.loads((pilot.directory / COST_NAME).read_text())["best_score"]
            if loss is None or not math.isfinite(loss):
                reason = f"{pilot.label} ended with validation loss {loss}."
                self.report(reason)
                continue
            losses[trial] = loss
        if method.choose and not losses:
            raise RunFailedError(
                f"All trials of {domain} · {method.name} failed. The last one: {reason}"
            )
        return min(losses, key=lambda trial: losses[trial]) if losses else ()

    def _plan(
        self, domain: str, method: Method, choices: tuple[str, ...], is_pilot: bool = False
    ) -> Run:
        overrides = (*self.study.overrides, *self.study.domains[domain], *method.overrides)
        if method.model_of:
            model = self.runs[domain, method.model_of].directory.resolve() / BEST
            overrides += ("model=pretrained", f"model.path={model}")
        overrides += choices
        plan = partial(new_run, domain, method.name, root=self.root, inputs=self._inputs[domain])
        if is_pilot:
            batches = f"+trainer.limit_train_batches={method.pilot_batches}"
            return plan((*overrides, batches), also_test=None, values=choices)
        others = {name: path for name, path in self.study.tests.items() if name != domain}
        return plan(overrides, also_test=others)

    def _carry_out(self, run: Run) -> None:
        if self._stopped and not is_finished(run):
            raise RunFailedError(f"{run.label} was not started.")
        with self._locks.setdefault(run.directory, threading.Lock()):  # methods share pilots
            if is_finished(run):
                return
            self.report(f"{run.label}: running, output in {run.directory / OUTPUT_NAME}")
            self._running[run.label] = time.perf_counter()
            try:
                carry_out(run, self.train, self._environment, self._processes, self.report)
            finally:
                self._running.pop(run.label, None)

    def _tell(
        self,
        cell: tuple[str, str],
        future: Future[None],
        number: int,
        cells: list[tuple[str, str]],
    ) -> None:
        self._told.add(cell)
        error = future.exception()
        if error is not None and not isinstance(error, StudyError):
            raise error
        if error is not None:
            self.failures.append(str(error))
            said = str(error)
        else:
            run = self.runs[cell]
            usage = read_usage(run)
            took = f", {minutes(usage.seconds)}" if usage else ""
            said = f"{run.label}: {run.directory}{took}"
        left = self._seconds_left([each for each in cells if each not in self._told])
        self.report(f"[{number}/{len(cells)}] {said}{left}")

    def _seconds_left(self, cells: list[tuple[str, str]]) -> str:
        """The time left, from what the same method took on other domains, or all methods."""
        known = [seconds for each in self._seconds.values() for seconds in each]
        if not known or not cells:
            return ""
        seconds = sum(statistics.median(self._seconds.get(method, known)) for _, method in cells)
        return f"  (about {minutes(seconds / self.jobs)} left)"


def minutes(seconds: float) -> str:
    """A readable duration: 42 s, 7 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    whole = round(seconds / 60)
    return f"{whole} min" if whole < 90 else f"{whole // 60} h {whole % 60:02} min"
