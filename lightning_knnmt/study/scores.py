"""Differences between the systems of one domain, and the single lines that some hang on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_knnmt.evaluation.bootstrap import Difference, Resampled, difference, resample
from lightning_knnmt.evaluation.scoring import MetricName


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
    """Scores translations, each once."""

    def __init__(
        self,
        hypotheses: Mapping[tuple[str, str], Sequence[str]],
        references: Mapping[str, Sequence[str]],
        baselines: Mapping[str, Sequence[str]],
    ) -> None:
        """
        Args:
            hypotheses: By system and test set.
            references: By test set.
            baselines: What each system is compared with, where there are translations.
        """
        self.hypotheses = hypotheses
        self.references = references
        self.baselines = baselines
        self._known: dict[tuple[str, str, MetricName, int | None], Resampled] = {}

    def score(
        self, system: str, test_set: str, metric: MetricName, omitted: int | None = None
    ) -> Resampled:
        """A system's score, perhaps without one line (from 1)."""
        key = system, test_set, metric, omitted
        if key not in self._known:
            ours, gold = (
                [line for number, line in enumerate(text, start=1) if number != omitted]
                for text in (self.hypotheses[system, test_set], self.references[test_set])
            )
            self._known[key] = resample(ours, gold, metric)
        return self._known[key]

    def against(
        self, system: str, test_set: str, metric: MetricName, omitted: int | None = None
    ) -> dict[str, Difference]:
        """A system's differences to the baselines, perhaps without one line (from 1)."""
        return {
            baseline: difference(
                self.score(system, test_set, metric, omitted),
                self.score(baseline, test_set, metric, omitted),
            )
            for baseline in dict.fromkeys(self.baselines[system])
            if baseline != system and (baseline, test_set) in self.hypotheses
        }

    def decisive_line(self, test_set: str) -> int | None:
        """The line that a difference of BLEU hangs on; of several the one that moves it most."""
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
