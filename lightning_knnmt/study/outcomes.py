"""The outcomes of a study's runs: scores with intervals, costs, chosen values, commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_knnmt.evaluation.bootstrap import Difference, Resampled, difference, resample
from lightning_knnmt.evaluation.results import ResultRow, hypotheses_path, read_results
from lightning_knnmt.evaluation.scoring import Bleu, ChrF, Metric, MetricName
from lightning_knnmt.study.plan import Run, Study, StudyError, own_test, read_lines
from lightning_knnmt.study.process import COST_NAME, Usage, read_usage


@dataclass(frozen=True)
class WithoutLine:
    """A system's BLEU without one line of a test set.

    Attributes:
        line: From 1.
        differences: By baseline.
    """

    line: int
    bleu: float
    differences: Mapping[str, Difference]


class Scores:
    """Scores translations and keeps the scores, as they enter many differences."""

    def __init__(
        self,
        hypotheses: Mapping[tuple[str, str], Sequence[str]],
        references: Mapping[str, Sequence[str]],
        baselines: Mapping[str, Sequence[str]],
        tokenizer: str,
    ) -> None:
        """
        Args:
            hypotheses: By system and test set.
            references: By test set.
            baselines: The systems that each system is compared with, if they have translations.
            tokenizer: BLEU's.
        """
        self.hypotheses = hypotheses
        self.references = references
        self.baselines = baselines
        self.metrics: dict[MetricName, Metric] = {"bleu": Bleu(tokenizer), "chrf": ChrF()}
        self._known: dict[tuple[str, str, MetricName, int | None], Resampled] = {}

    def score(
        self, system: str, test_set: str, metric: MetricName, omitted: int | None = None
    ) -> Resampled:
        """A system's score; `omitted` is a line, from 1, to leave out."""
        key = system, test_set, metric, omitted
        if key not in self._known:
            ours, gold = (
                [line for number, line in enumerate(text, start=1) if number != omitted]
                for text in (self.hypotheses[system, test_set], self.references[test_set])
            )
            self._known[key] = resample(ours, gold, self.metrics[metric])
        return self._known[key]

    def against(
        self, system: str, test_set: str, metric: MetricName, omitted: int | None = None
    ) -> dict[str, Difference]:
        """A system's differences to its baselines; `omitted` as in `score`."""
        return {
            baseline: difference(
                self.score(system, test_set, metric, omitted),
                self.score(baseline, test_set, metric, omitted),
            )
            for baseline in dict.fromkeys(self.baselines[system])
            if baseline != system and (baseline, test_set) in self.hypotheses
        }

    def decisive_line(self, test_set: str) -> int | None:
        """The line that moves a difference of BLEU most, if any difference hangs on one line."""
        moved = {
            each.line: abs(each.value - each.without)
            for system, name in self.hypotheses
            if name == test_set
            for each in self.against(system, test_set, "bleu").values()
            if each.hangs_on_one_line
        }
        return max(moved, key=moved.__getitem__, default=None)

    def without_line(self, system: str, test_set: str, line: int) -> WithoutLine:
        """A system's BLEU without one line of a test set."""
        bleu = self.score(system, test_set, "bleu", line).value
        return WithoutLine(line, bleu, self.against(system, test_set, "bleu", line))


@dataclass(frozen=True)
class Cell:
    """A method, adapted to a domain, on a test set.

    Attributes:
        test_set: Its name; the domain's for the domain's own.
        differences: Of BLEU and chrF, by metric and baseline.
        without: BLEU without one line, if a difference on this test set hangs on it.
    """

    domain: str
    method: str
    test_set: str
    row: ResultRow
    differences: Mapping[tuple[str, str], Difference]
    without: WithoutLine | None

    @property
    def is_in_domain(self) -> bool:
        return self.test_set == self.domain


@dataclass(frozen=True)
class Cost:
    """What a method cost on a domain.

    Attributes:
        training: The content of training.json; None if nothing was trained.
        usage: None if it was not measured.
        chosen: The values that pilots chose, as overrides.
        command: To type at the repository's root.
    """

    domain: str
    method: str
    training: Mapping[str, Any] | None
    usage: Usage | None
    chosen: tuple[str, ...]
    command: str
    directory: Path


def collect_cells(study: Study, runs: Mapping[tuple[str, str], Run]) -> list[Cell]:
    """Scores of all finished runs, in the study's order.

    Args:
        study: What was run.
        runs: Finished runs, by domain and method.

    Raises:
        StudyError: If a test set's references are missing or have changed.
    """
    return [cell for domain in study.domains for cell in _cells_of_domain(study, domain, runs)]


def _cells_of_domain(
    study: Study, domain: str, runs: Mapping[tuple[str, str], Run]
) -> Iterator[Cell]:
    found = {
        method: _rows(domain, runs[domain, method])
        for method in study.methods
        if (domain, method) in runs
    }
    language = study.setting(domain, "data.target_lang")
    tests = {**study.tests, domain: own_test(study, domain)}  # `tests` may have a part of it
    references = {
        test_set: read_lines(tests[test_set], language)
        for test_set in {name for rows in found.values() for name in rows}
    }
    hypotheses = {
        (method, test_set): _hypotheses(runs[domain, method], row)
        for method, rows in found.items()
        for test_set, row in rows.items()
    }
    for (method, test_set), lines in hypotheses.items():
        if len(lines) != len(references[test_set]):
            raise StudyError(
                f"{tests[test_set]} has {len(references[test_set]):,} lines, but {domain} · "
                f"{method} translated {len(lines):,}: the text has changed since then. "
                f"Delete {runs[domain, method].directory} and run again."
            )
    baselines = {
        method: [*study.baselines, *(b for m, b in study.comparisons if m == method)]
        for method in found
    }
    tokenizers = {row.bleu_tokenizer for rows in found.values() for row in rows.values()}
    if len(tokenizers) > 1:
        raise StudyError(
            f"The runs of {domain} count BLEU with different tokenizers ({', '.join(tokenizers)}): "
            "delete their folders and run again with one data.bleu_tokenizer."
        )
    if not tokenizers:
        return
    scores = Scores(hypotheses, references, baselines, tokenizers.pop())
    decisive = {test_set: scores.decisive_line(test_set) for test_set in references}
    for method, rows in found.items():
        for test_set, row in rows.items():
            differences: dict[tuple[str, str], Difference] = {
                (metric, baseline): each
                for metric in scores.metrics
                for baseline, each in scores.against(method, test_set, metric).items()
            }
            line = decisive[test_set]
            without = None if line is None else scores.without_line(method, test_set, line)
            yield Cell(domain, method, test_set, row, differences, without)


def collect_costs(
    study: Study, runs: Mapping[tuple[str, str], Run], choices: Mapping[tuple[str, str], Any]
) -> list[Cost]:
    """The costs of all finished runs, in the study's order."""
    costs = []
    for domain in study.domains:
        for method in study.methods:
            run = runs.get((domain, method))
            if run is None:
                continue
            path = run.directory / COST_NAME
            training = json.loads(path.read_text()) if path.exists() else None
            chosen = tuple(choices.get((domain, method), ()))
            command = shlex.join(["python", "train.py", *run.overrides])
            usage = read_usage(run)
            costs.append(Cost(domain, method, training, usage, chosen, command, run.directory))
    return costs


def _rows(domain: str, run: Run) -> dict[str, ResultRow]:
    """The method's row for each test set; its own test set stands first in the results."""
    rows = read_results(run.directory)
    assert run.test_sets is not None, "a pilot has no results"
    names = {row.test_set: row.test_set for row in rows if row.test_set in run.test_sets}
    return {names.get(row.test_set, domain): row for row in rows}


def _hypotheses(run: Run, row: ResultRow) -> list[str]:
    text = hypotheses_path(run.directory, *row.key).read_text(encoding="utf-8")
    return text.removesuffix("\n").split("\n")


def translations(run: Run, domain: str) -> list[str]:
    """A run's translations of its domain's test set."""
    return _hypotheses(run, _rows(domain, run)[domain])
