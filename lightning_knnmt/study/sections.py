"""A domain's analyses as Markdown, with their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lightning_knnmt import figures
from lightning_knnmt.analysis import (
    BucketNeighbours,
    PredictionReport,
    ScalePoint,
    WordRecall,
    WordRecallDifference,
)
from lightning_knnmt.analysis.word_recall import BucketDifference
from lightning_knnmt.study.analyses import FOUND_AT, GRADIENT_NEIGHBOURS, TOKEN_BUCKETS, Gradients
from lightning_knnmt.study.report import markdown_table


class Sections:
    """Collects one domain's sections; its figures go into a folder."""

    def __init__(self, domain: str, directory: Path, prefix: str) -> None:
        """
        Args:
            domain: For headings.
            directory: Of the figures.
            prefix: Of the figures' names.
        """
        self.domain = domain
        self.directory = directory
        self.prefix = prefix
        self.parts: list[str] = []
        directory.mkdir(parents=True, exist_ok=True)

    def words(
        self,
        recalls: Mapping[str, WordRecall],
        differences: Mapping[str, WordRecallDifference],
        baseline: str,
    ) -> None:
        """Word recall by in-domain frequency."""
        self._head("Word recall by in-domain frequency")
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
            self.parts.append(f"Recall of {title}, %; in brackets the difference to {baseline}:")
            self.parts.append(markdown_table(header, rows))
            figure = self._figure(f"word-recall-{kind.replace('_', '-')}")
            buckets_drawn = {name: each[:-1] for name, each in rows_of.items()}
            figures.draw_word_recall(
                buckets_drawn, figure, f"{self.domain}: recall of {title} by in-domain frequency"
            )

    def gradients(self, gradients: Gradients) -> None:
        """The meta-gradient against the OPL's gradient, and the relaxed form."""
        self._head("The gradient that retrieval stands for, against the output projection's")
        temperatures = sorted({temperature for _, _, temperature in gradients.by_setting})
        header = [
            "k",
            "metric",
            *(f"T {temperature:g}" for temperature in temperatures),
            "no decay",
        ]
        rows = []
        for k in GRADIENT_NEIGHBOURS:
            for metric in ("l2", "ip"):
                found = [gradients.by_setting[k, metric, each] for each in temperatures]
                cells = [
                    f"{each.cosine.mean:.3f} ({each.norm_ratio.median:.1f})"
                    if each.cosine and each.norm_ratio
                    else ""
                    for each in found
                ]
                without = found[0].cosine_without_decay
                rows.append([k, metric, *cells, f"{without.mean:.3f}" if without else ""])
        self.parts.append(
            "Mean cosine of ΔW_kNN = V Kᵀ - T W_O and ΔW_OPL = (V - P) Kᵀ over the tokens of the "
            "test text, and in brackets the median of |ΔW_kNN| / |ΔW_OPL|. The inner product's T "
            "is half of L2's (L2 at T is the inner product at T/2, but for the keys' lengths). "
            "The last column leaves the decay T W_O out."
        )
        self.parts.append(markdown_table(header, rows))
        for each in gradients.pooled:
            if each.cosine and each.cosine_without_decay:
                self.parts.append(
                    f"Gradients of a decoding step added up over 32 sentences, metric "
                    f"{each.metric}, with decoding's k and T: mean cosine {each.cosine.mean:.3f}, "
                    f"without the decay {each.cosine_without_decay.mean:.3f}."
                )
        panels = {}
        for metric in ("l2", "ip"):
            panels[f"cosine, {metric}"] = np.array(
                [
                    [_mean(gradients.by_setting[k, metric, each].cosine) for each in temperatures]
                    for k in GRADIENT_NEIGHBOURS
                ]
            )
        figures.draw_settings(
            panels,
            GRADIENT_NEIGHBOURS,
            temperatures,
            self._figure("gradients"),
            f"{self.domain}: cosine of retrieval's step and the gradient's (T of L2)",
        )
        self._relaxed(gradients, temperatures)

    def _relaxed(self, gradients: Gradients, temperatures: Sequence[float]) -> None:
        shape = (len(GRADIENT_NEIGHBOURS), len(temperatures))
        l2 = [each for each in gradients.relaxed if each.metric == "l2"]
        rows = []
        for each in gradients.relaxed:
            if each.mean_kl is not None and each.top_agreement is not None:
                numbers = [f"{each.mean_kl:.2f}", f"{100 * each.top_agreement:.1f}"]
                rows.append([each.metric, each.num_neighbours, f"{each.temperature:g}", *numbers])
        best = sorted(rows, key=lambda row: float(str(row[-2])))[:6]
        self.parts.append(
            "The relaxed (linear) form's prediction against the mixture's, by k and T, λ "
            f"{l2[0].knn_weight:g}: the six nearest of {len(rows)} settings."
        )
        header = ["metric", "k", "T", "mean KL, nats", "same best token, %"]
        self.parts.append(markdown_table(header, best))
        panels = {
            "KL, nats": np.array([_number(each.mean_kl) for each in l2]).reshape(shape),
            "same best token": np.array([_number(each.top_agreement) for each in l2]).reshape(
                shape
            ),
        }
        figures.draw_settings(
            panels,
            GRADIENT_NEIGHBOURS,
            temperatures,
            self._figure("relaxed"),
            f"{self.domain}: the relaxed form against the softmax form, L2",
        )

    def predictions(self, report: PredictionReport) -> None:
        """p(gold) of every system, and agreement with retrieval."""
        self._head("Probability of the gold token")
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
        agreements = [
            [
                f"{each.first} / {each.second}",
                f"{100 * each.top_agreement:.1f}",
                f"{each.median_kl:.3f}",
                f"{each.mean_js:.3f}",
            ]
            for each in report.agreements
        ]
        header = ["pair", "same best token, %", "median KL, nats", "mean JS, nats"]
        self.parts.append(markdown_table(header, agreements))

    def neighbours(self, found: Mapping[str, Sequence[BucketNeighbours]]) -> None:
        """Gold among the neighbours, by frequency and representation."""
        self._head("Gold token among the neighbours")
        header = ["representation", "tokens of", "number", *(f"found at {k}, %" for k in FOUND_AT)]
        header += ["mean rank", "distance of gold", "of others"]
        rows = []
        for name, buckets in found.items():
            for bucket in buckets:
                shares = [_percent(each.fraction) for each in bucket.found]
                rows.append(
                    [
                        name,
                        TOKEN_BUCKETS[bucket.bucket],
                        f"{bucket.num_tokens:,}",
                        *shares,
                        *(
                            "" if each is None else f"{each:.1f}"
                            for each in (
                                bucket.mean_rank,
                                bucket.mean_gold_distance,
                                bucket.mean_other_distance,
                            )
                        ),
                    ]
                )
        self.parts.append(
            "Buckets are of vocabulary units by their count in the datastore; the rank is among "
            "different tokens, of those found."
        )
        self.parts.append(markdown_table(header, rows))
        curves = {
            TOKEN_BUCKETS[number]: {
                name: [each.fraction for each in buckets[number].found]
                for name, buckets in found.items()
            }
            for number in range(len(TOKEN_BUCKETS))
        }
        figures.draw_found_at_k(
            curves,
            FOUND_AT,
            self._figure("neighbours"),
            f"{self.domain}: gold token among the k nearest entries",
        )

    def scaling(self, points: Sequence[ScalePoint]) -> None:
        """What a larger datastore gives and takes."""
        self._head("Datastore size")
        header = ["share, %", "entries", "BLEU", "gold among 32, %", "k, λ, T (on valid)"]
        header += ["search, s per 1,000 queries", "memory, MB"]
        rows = [
            [
                f"{100 * point.share:g}",
                f"{point.num_entries:,}",
                "" if point.bleu is None else f"{point.bleu:.2f}",
                f"{100 * point.gold_recall:.1f}",
                str(point.setting),
                f"{point.seconds_per_1000_queries:.3f}",
                f"{point.memory_bytes / 1e6:,.1f}",
            ]
            for point in points
        ]
        self.parts.append("Nested random parts of the datastore, exact search, greedy decoding.")
        self.parts.append(markdown_table(header, rows))
        figures.draw_scaling(
            {"exact search": points}, self._figure("scaling"), f"{self.domain}: datastore size"
        )

    def speed(self, speeds: Mapping[str, float], base: str) -> None:
        """Decoding speed relative to the base."""
        self._head("Decoding speed")
        self.parts.append(
            f"Tokens a second of processor time, greedy, as a share of {base}'s; the systems took "
            "turns, medians of 3."
        )
        rows = [[name, f"{speed:.2f}"] for name, speed in speeds.items()]
        self.parts.append(markdown_table(["method", f"speed / {base}"], rows))

    def _head(self, title: str) -> None:
        self.parts.append(f"### {self.domain}: {title[0].lower()}{title[1:]}")

    def _figure(self, name: str) -> Path:
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


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _mean(summary: object) -> float:
    return float(getattr(summary, "mean", np.nan))


def _number(value: float | None) -> float:
    return np.nan if value is None else value
