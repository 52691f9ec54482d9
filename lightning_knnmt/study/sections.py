"""A domain's analyses as Markdown sections with figures, and the same values for programs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_knnmt.analysis.gradient_steps import RelaxedAgreement
from lightning_knnmt.analysis.neighbour_ranks import BucketNeighbours
from lightning_knnmt.analysis.predictions import PredictionReport, Summary
from lightning_knnmt.analysis.scaling import ScalePoint
from lightning_knnmt.analysis.word_recall import (
    BUCKETS,
    BucketDifference,
    BucketRecall,
    WordRecall,
    WordRecallDifference,
)
from lightning_knnmt.evaluation.bootstrap import Resampled, difference
from lightning_knnmt.study.analyses import METRICS, Gradients, plain
from lightning_knnmt.study.figures import charts
from lightning_knnmt.study.report import interval, markdown_table

WORD_KINDS = (  # field of the results, title, what it means
    ("all_words", "all words", ""),
    (
        "domain_specific",
        "domain-specific words",
        " (at least twice as frequent in the domain's training text as in the general text, "
        "relative to their lengths)",
    ),
)


class Sections:
    """Collects the sections of one domain; `write_...` add to it.

    Attributes:
        parts: Markdown.
        facts: The same values and more for programs, by analysis.
    """

    def __init__(self, domain: str, directory: Path, prefix: str, num_sentences: int) -> None:
        """
        Args:
            domain: Its name, for headings.
            directory: Folder of the figures.
            prefix: Of the figures' file names.
            num_sentences: How many sentences of a text the slow analyses use.
        """
        self.domain = domain
        self.directory = directory
        self.prefix = prefix
        self.num_sentences = num_sentences
        self.parts: list[str] = []
        self.facts: dict[str, Any] = {}
        directory.mkdir(parents=True, exist_ok=True)

    def begin(self, title: str, name: str, result: object) -> None:
        """Begins a section and keeps its result for programs, under a name."""
        self.parts.append(f"### {self.domain}: {title[0].lower()}{title[1:]}")
        self.facts[name] = plain(result)

    def figure(self, name: str) -> Path:
        """Adds a figure and returns the path to draw it to."""
        file_name = f"{self.prefix}{name}.png"
        self.parts.append(f"![{name}]({self.directory.name}/{file_name})")
        return self.directory / file_name


def write_words(
    sections: Sections,
    recalls: Mapping[str, WordRecall],
    differences: Mapping[str, WordRecallDifference],
    baseline: str,
    drawn: Collection[str],
) -> None:
    """Writes word recall by in-domain frequency.

    Args:
        recalls: Of every system.
        differences: Of every system but the baseline, to it.
        baseline: Its name.
        drawn: Systems in the figure, which has no room for all.
    """
    sections.begin("Word recall by in-domain frequency", "word recall", recalls)
    sections.facts[f"word recall against {baseline}"] = plain(differences)
    for kind, title, meaning in WORD_KINDS:
        rows_of = {name: getattr(recall, kind) for name, recall in recalls.items()}
        first = next(iter(rows_of.values()))
        header = ["method", *(f"{b.bucket} ({b.reference_words:,} words)" for b in first)]
        rows = []
        for name, buckets in rows_of.items():
            found = differences.get(name)
            gains = getattr(found, kind) if found else [None] * len(buckets)
            rows.append([name, *map(_recall, buckets, gains)])
        sections.parts.append(
            f"Recall of {title}{meaning}, %; in brackets the difference to {baseline}:"
        )
        sections.parts.append(markdown_table(header, rows))
        charts.draw_word_recall(
            {name: rows_of[name][:-1] for name in rows_of if name in drawn},
            sections.figure(f"word-recall-{kind.replace('_', '-')}"),
            f"{sections.domain}: recall of {title} by in-domain frequency",
        )


def write_gradients(sections: Sections, gradients: Gradients) -> None:
    """Writes how kNN-MT's implicit gradient compares with the OPL's, and the relaxed form."""
    title = "The gradient that retrieval stands for, against the output projection's"
    sections.begin(title, "gradients", gradients)
    decoding = gradients.decoding
    ks = sorted({k for k, _, _ in gradients.by_setting})
    temperatures = sorted({temperature for _, _, temperature in gradients.by_setting})
    header = ["k", "metric", *(f"T {temperature:g}" for temperature in temperatures), "no decay"]
    rows = []
    for k in ks:
        for metric, _ in METRICS:
            found = [gradients.by_setting[k, metric, each] for each in temperatures]
            cells = [
                f"{each.cosine.mean:.3f} ({each.norm_ratio.median:.1f})"
                if each.cosine and each.norm_ratio
                else ""
                for each in found
            ]
            no_decay = found[0].cosine_without_decay
            rows.append([f"{k}", metric, *cells, f"{no_decay.mean:.3f}" if no_decay else ""])
    sections.parts.append(
        "Mean cosine of ΔW_kNN = V Kᵀ - T W_O and ΔW_OPL = (V - P) Kᵀ over tokens of the test "
        "text; in brackets the median of |ΔW_kNN| / |ΔW_OPL|. The inner product's T is half of "
        "L2's (apart from the keys' lengths, L2 at T is the inner product at T/2). The last column "
        "leaves the decay T W_O out."
    )
    sections.parts.append(markdown_table(header, rows))
    of_tokens = gradients.by_setting[decoding.num_neighbours, "l2", decoding.temperature]
    (of_steps,) = [each for each in gradients.pooled if each.metric == "l2"]
    for what, each in (
        ("single tokens", of_tokens),
        (
            "decoding steps, which add up the tokens at one position of 32 sentences "
            f"(mean {gradients.tokens_a_step:.1f})",
            of_steps,
        ),
    ):
        without = _with_interval(each.cosine_without_decay, each.cosine_without_decay_interval)
        sections.parts.append(
            f"With decoding's k {decoding.num_neighbours} and T {decoding.temperature:g}, L2, of "
            f"{what}: mean cosine {_with_interval(each.cosine, each.cosine_interval)}, without the "
            f"decay {without}."
        )
    panels = {
        f"cosine, {metric}": np.array(
            [[_mean(gradients.by_setting[k, metric, t].cosine) for t in temperatures] for k in ks]
        )
        for metric, _ in METRICS
    }
    title = f"{sections.domain}: cosine of retrieval's step and the gradient's (T of L2)"
    charts.draw_settings(panels, ks, temperatures, sections.figure("gradients"), title)
    _write_relaxed(sections, gradients, ks, temperatures)


def _write_relaxed(
    sections: Sections, gradients: Gradients, ks: Sequence[int], temperatures: Sequence[float]
) -> None:
    decoding = gradients.decoding
    l2 = {
        (each.num_neighbours, each.temperature): each
        for each in gradients.relaxed
        if each.metric == "l2"
    }
    used = l2[decoding.num_neighbours, decoding.temperature]
    nearest = min(l2.values(), key=lambda each: _number(each.mean_kl))
    sections.parts.append(
        "The relaxed (linear) form's prediction against the mixture's, L2, "
        f"λ {decoding.knn_weight:g}: mean KL in nats; in brackets the share of tokens, %, for "
        "which the most probable token is the same. The relaxed form leaves out L2's offset, which "
        f"is not linear in h. With decoding's k and T: {_agreement(used)}, median KL "
        f"{_number(used.median_kl):.2f}. The smallest KL is at k {nearest.num_neighbours}, "
        f"T {nearest.temperature:g}: {_agreement(nearest)}. With one neighbour the softmax over "
        "neighbours is constant, so T is only a step size."
    )
    rows = [[f"{k}", *(_agreement(l2[k, t]) for t in temperatures)] for k in ks]
    header = ["k", *(f"T {temperature:g}" for temperature in temperatures)]
    sections.parts.append(markdown_table(header, rows))
    panels = {
        name: np.array([[_number(getattr(l2[k, t], field)) for t in temperatures] for k in ks])
        for name, field in (("KL, nats", "mean_kl"), ("same best token", "top_agreement"))
    }
    title = f"{sections.domain}: the relaxed form against the softmax form, L2"
    charts.draw_settings(panels, ks, temperatures, sections.figure("relaxed"), title)


def write_predictions(sections: Sections, report: PredictionReport) -> None:
    """Writes p(gold) of every system, and how far each two agree."""
    sections.begin("Probability of the gold token", "predictions", report)
    rows = [
        [
            name,
            f"{each.probabilities.mean:.3f} [{each.low:.3f}, {each.high:.3f}]",
            f"{each.probabilities.variance:.3f}",
            f"{each.probabilities.median:.3f}",
            f"{each.mean_log:.3f}",
        ]
        for name, each in report.gold.items()
    ]
    sections.parts.append(
        f"{report.num_tokens:,} tokens of {report.num_sentences:,} test sentences, teacher-forced; "
        "in brackets 95 % intervals by bootstrap over sentences. A confident system can have a "
        "better mean and a worse mean logarithm."
    )
    header = ["system", "mean p(gold)", "variance", "median", "mean log p(gold), nats"]
    sections.parts.append(markdown_table(header, rows))
    means = {n: (each.probabilities.mean, each.low, each.high) for n, each in report.gold.items()}
    charts.draw_dots(
        {"mean": means},
        sections.figure("gold-probability"),
        "mean p(gold), with 95 % intervals",
        f"{sections.domain}: probability of the gold token",
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
    sections.parts.append(markdown_table(header, agreements))


def write_neighbours(sections: Sections, found: Mapping[str, Sequence[BucketNeighbours]]) -> None:
    """Writes where gold tokens stand among the neighbours, by frequency and representation."""
    sections.begin("Gold token among the neighbours", "neighbours", found)
    ks = [each.num_neighbours for each in next(iter(found.values()))[0].found]
    header = ["representation", "tokens of", "count", *(f"found at {k}, %" for k in ks)]
    header += ["mean rank", "distance of gold", "of others", "gold / others"]
    rows = []
    for name, buckets in found.items():
        for bucket in buckets:
            shares = [_percent(each.fraction) for each in bucket.found]
            largest = bucket.found[-1]
            if largest.low is not None:
                shares[-1] += f" [{_percent(largest.low)}, {_percent(largest.high)}]"
            distances = (bucket.mean_rank, bucket.mean_gold_distance, bucket.mean_other_distance)
            means = ["" if each is None else f"{each:.1f}" for each in distances]
            ratio = "" if bucket.distance_ratio is None else f"{bucket.distance_ratio:.2f}"
            label, count = BUCKETS[bucket.bucket], f"{bucket.num_tokens:,}"
            rows.append([name, label, count, *shares, *means, ratio])
    sections.parts.append(
        "Buckets are of vocabulary units by their count in the datastore. The rank counts "
        "different tokens, of those that were found. In brackets, for the largest k, 95 % "
        "intervals by bootstrap over sentences. Each representation has its own scale of "
        "distances; gold / others, the ratio of their means, can be compared."
    )
    sections.parts.append(markdown_table(header, rows))
    curves = {
        label: {name: [f.fraction for f in buckets[i].found] for name, buckets in found.items()}
        for i, label in enumerate(BUCKETS)
    }
    title = f"{sections.domain}: gold token among the k nearest entries"
    charts.draw_found_at_k(curves, ks, sections.figure("neighbours"), title)


def write_scaling(sections: Sections, points: Sequence[ScalePoint]) -> None:
    """Writes what a larger datastore gives and takes."""
    sections.begin("Datastore size", "datastore size", points)
    header = ["share of sentences, %", "entries", "BLEU", "gain over the smaller part"]
    header += ["gold among 32, %", "k, λ, T", "search, s per 1,000 queries", "memory, MB"]
    rows = [
        [
            f"{100 * point.share:g}",
            f"{point.num_entries:,}",
            ""
            if point.bleu is None or point.bleu_interval is None
            else "{:.2f} [{:.2f}, {:.2f}]".format(point.bleu, *point.bleu_interval),
            interval(point.bleu_gain),
            f"{100 * point.gold_recall:.1f}",
            str(point.setting),
            f"{point.seconds_per_1000_queries:.3f}",
            f"{point.memory_bytes / 1e6:,.1f}",
        ]
        for point in points
    ]
    sections.parts.append(
        "Nested random parts of the datastore, of whole sentences, exact search. BLEU is of "
        f"greedy translations of the test set's first {sections.num_sentences:,} sentences, with "
        "95 % intervals; the gain is over the row above, by paired bootstrap. Each part's k, λ "
        f"and T were chosen on the validation set's first {sections.num_sentences:,} sentences, "
        "whose tokens also give gold among 32 and the search time."
    )
    sections.parts.append(markdown_table(header, rows))
    title = f"{sections.domain}: datastore size"
    charts.draw_scaling({"exact search": points}, sections.figure("scaling"), title)


def write_order(sections: Sections, scores: Mapping[str, tuple[Resampled, Resampled]]) -> None:
    """Writes BLEU with a combiner trained after the adapters, and before them."""
    gains = {name: difference(after, before) for name, (after, before) in scores.items()}
    sections.begin("Order of adapters and combiner", "order", gains)
    sections.parts.append(
        f"Greedy BLEU of adapted models on the test set's first {sections.num_sentences:,} "
        "sentences. The combiner was trained after the adapters, on the adapted model's own "
        "retrievals, or before, on the base model's, whose T it keeps. Differences have 95 % "
        "intervals by paired bootstrap."
    )
    rows = [
        [name, f"{after.value:.2f}", f"{before.value:.2f}", interval(gains[name])]
        for name, (after, before) in scores.items()
    ]
    header = ["method", "combiner after", "combiner before", "difference"]
    sections.parts.append(markdown_table(header, rows))
    charts.draw_dots(
        {"after - before": {name: (d.value, d.low, d.high) for name, d in gains.items()}},
        sections.figure("order"),
        "difference of BLEU, with 95 % intervals",
        f"{sections.domain}: combiner trained after the adapters, against before",
    )


def write_speed(sections: Sections, speeds: Mapping[str, float], base: str) -> None:
    """Keeps decoding speed relative to the base, which the report's table of costs shows."""
    sections.begin("Decoding speed", "speed", speeds)
    sections.parts.append(
        "In the table of costs: tokens per second of processor time, greedy, as a share of "
        f"{base}'s; medians of 3, measured in turns. Each system writes its own translations, so "
        "length and batching differ too."
    )


def _recall(bucket: BucketRecall, gain: BucketDifference | None) -> str:
    if bucket.recall is None:
        return ""
    said = _percent(bucket.recall.value)
    if gain is None or gain.difference is None:
        return said
    return f"{said} [{100 * gain.difference.low:+.1f}, {100 * gain.difference.high:+.1f}]"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _mean(summary: Summary | None) -> float:
    return np.nan if summary is None else summary.mean


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _with_interval(summary: Summary | None, bounds: tuple[float, float] | None) -> str:
    if summary is None or bounds is None:
        return "unknown"
    return f"{summary.mean:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def _agreement(relaxed: RelaxedAgreement) -> str:
    return f"{_number(relaxed.mean_kl):.2f} ({_percent(relaxed.top_agreement)})"
