"""A domain's analyses as Markdown, with their figures."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lightning_knnmt.analysis import (
    PredictionReport,
    WordRecall,
    WordRecallDifference,
)
from lightning_knnmt.analysis.word_recall import BucketDifference
from lightning_knnmt.evaluation.bootstrap import Resampled, difference
from lightning_knnmt.study import figures
from lightning_knnmt.study.facts import plain
from lightning_knnmt.study.tables import interval, markdown_table


class Sections:
    """Collects one domain's sections; its figures go into a folder.

    Attributes:
        parts: Markdown.
        facts: The same numbers, and more, for programs, by analysis.
    """

    def __init__(self, domain: str, directory: Path, prefix: str, num_sentences: int) -> None:
        """
        Args:
            domain: For headings.
            directory: Of the figures.
            prefix: Of the figures' names.
            num_sentences: How many of a text systems are asked about where that takes time.
        """
        self.domain = domain
        self.directory = directory
        self.prefix = prefix
        self.num_sentences = num_sentences
        self.parts: list[str] = []
        self.facts: dict[str, Any] = {}
        directory.mkdir(parents=True, exist_ok=True)

    def words(
        self,
        recalls: Mapping[str, WordRecall],
        differences: Mapping[str, WordRecallDifference],
        baseline: str,
        drawn: Collection[str],
    ) -> None:
        """Word recall by in-domain frequency; the figure has no room for all systems."""
        self.head("Word recall by in-domain frequency")
        self.keep("word recall", recalls)
        self.keep(f"word recall against {baseline}", differences)
        for kind, title in (
            ("all_words", "all words"),
            ("domain_specific", "domain-specific words"),
        ):
            rows_of = {name: getattr(recall, kind) for name, recall in recalls.items()}
            first = next(iter(rows_of.values()))
            header = ["method", *(f"{b.bucket} ({b.reference_words:,} words)" for b in first)]
            rows = [
                [
                    name,
                    *(
                        _recall(bucket.recall.value if bucket.recall else None, difference)
                        for bucket, difference in zip(
                            buckets,
                            getattr(differences[name], kind)
                            if name in differences
                            else [None] * len(buckets),
                            strict=True,
                        )
                    ),
                ]
                for name, buckets in rows_of.items()
            ]
            meaning = (
                " (at least twice as frequent in the domain's training text as in the general one, "
                "relative to their lengths)"
                if kind == "domain_specific"
                else ""
            )
            self.parts.append(
                f"Recall of {title}{meaning}, %; in brackets the difference to {baseline}:"
            )
            self.parts.append(markdown_table(header, rows))
            figure = self.figure(f"word-recall-{kind.replace('_', '-')}")
            buckets_drawn = {name: rows_of[name][:-1] for name in rows_of if name in drawn}
            figures.draw_word_recall(
                buckets_drawn, figure, f"{self.domain}: recall of {title} by in-domain frequency"
            )

    def predictions(self, report: PredictionReport) -> None:
        """p(gold) of every system, and agreement with retrieval."""
        self.head("Probability of the gold token")
        self.keep("predictions", report)
        rows = [
            [
                name,
                f"{each.probabilities.mean:.3f} [{each.low:.3f}, {each.high:.3f}]",
                f"{each.probabilities.variance:.3f}",
                f"{each.probabilities.median:.3f}",
            ]
            for name, each in report.gold.items()
        ]
        self.parts.append(
            f"{report.num_tokens:,} tokens of {report.num_sentences:,} test sentences, "
            "teacher-forced; in brackets 95 % by bootstrap over sentences."
        )
        self.parts.append(markdown_table(["system", "mean p(gold)", "variance", "median"], rows))
        means = {
            name: (each.probabilities.mean, each.low, each.high)
            for name, each in report.gold.items()
        }
        figures.draw_dots(
            {"mean": means},
            self.figure("gold-probability"),
            "mean p(gold), with 95 % intervals",
            f"{self.domain}: probability of the gold token",
        )
        agreements = [
            [
                f"{each.first} / {each.second}",
                f"{100 * each.top_agreement:.1f}",
                "{:+.3f} [{:+.3f}, {:+.3f}]".format(each.gold_gain, *each.gold_gain_interval),
                f"{each.median_kl:.3f}",
                f"{each.mean_js:.3f}",
            ]
            for each in report.agreements
        ]
        header = ["pair", "same best token, %", "p(gold), difference", "median KL, nats"]
        header.append("mean JS, nats")
        self.parts.append(markdown_table(header, agreements))

    def order(self, scores: Mapping[str, tuple[Resampled, Resampled]]) -> None:
        """Whether the combiner was trained after or before the adapters."""
        self.head("Order of adapters and combiner")
        self.parts.append(
            f"Greedy BLEU on the test set's first {self.num_sentences:,} sentences of adapted "
            "models with a combiner that was trained after the adapters, on their own retrievals, "
            "or before, on the base's, whose T it has too; differences with 95 % intervals by "
            "paired bootstrap."
        )
        gains = {name: difference(after, before) for name, (after, before) in scores.items()}
        self.keep("order", gains)
        rows = [
            [name, f"{after.value:.2f}", f"{before.value:.2f}", interval(gains[name])]
            for name, (after, before) in scores.items()
        ]
        header = ["method", "combiner after", "combiner before", "difference"]
        self.parts.append(markdown_table(header, rows))
        figures.draw_dots(
            {"after - before": {name: (d.value, d.low, d.high) for name, d in gains.items()}},
            self.figure("order"),
            "difference of BLEU, with 95 % intervals",
            f"{self.domain}: combiner trained after the adapters, against before",
        )

    def speed(self, speeds: Mapping[str, float], base: str) -> None:
        """Decoding speed relative to the base, which the table of costs shows."""
        self.keep("speed", speeds)
        self.head("Decoding speed")
        self.parts.append(
            f"In the table of costs: tokens a second of processor time, greedy, as a share of "
            f"{base}'s; the systems took turns, medians of 3. Each translates in its own words, so "
            "that length and batching differ too."
        )

    def keep(self, name: str, result: object) -> None:
        """Keeps an analysis' numbers for programs."""
        self.facts[name] = plain(result)

    def head(self, title: str) -> None:
        """Begins a section."""
        self.parts.append(f"### {self.domain}: {title[0].lower()}{title[1:]}")

    def figure(self, name: str) -> Path:
        """Shows a figure, whose path is returned."""
        file_name = f"{self.prefix}{name}.png"
        self.parts.append(f"![{name}]({self.directory.name}/{file_name})")
        return self.directory / file_name


def _recall(value: float | None, difference: BucketDifference | None) -> str:
    if value is None:
        return ""
    if difference is None or difference.difference is None:
        return f"{100 * value:.1f}"
    low, high = difference.difference.low, difference.difference.high
    return f"{100 * value:.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
