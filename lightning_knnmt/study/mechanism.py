"""Sections on how retrieval works: gradients, neighbours, datastore size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lightning_knnmt.analysis import (
    BUCKETS,
    BucketNeighbours,
    RelaxedAgreement,
    ScalePoint,
    Summary,
)
from lightning_knnmt.study import figures
from lightning_knnmt.study.analyses import Gradients
from lightning_knnmt.study.sections import Sections
from lightning_knnmt.study.tables import interval, markdown_table


def write_gradients(sections: Sections, gradients: Gradients) -> None:
    """The meta-gradient against the OPL's gradient, and the relaxed form."""
    sections.head("The gradient that retrieval stands for, against the output projection's")
    sections.keep("gradients", gradients)
    decoding = gradients.decoding
    ks = sorted({k for k, _, _ in gradients.by_setting})
    temperatures = sorted({temperature for _, _, temperature in gradients.by_setting})
    header = ["k", "metric", *(f"T {temperature:g}" for temperature in temperatures), "no decay"]
    rows = []
    for k in ks:
        for metric in ("l2", "ip"):
            found = [gradients.by_setting[k, metric, each] for each in temperatures]
            cells = [
                f"{each.cosine.mean:.3f} ({each.norm_ratio.median:.1f})"
                if each.cosine and each.norm_ratio
                else ""
                for each in found
            ]
            without = found[0].cosine_without_decay
            rows.append([f"{k}", metric, *cells, f"{without.mean:.3f}" if without else ""])
    sections.parts.append(
        "Mean cosine of ΔW_kNN = V Kᵀ - T W_O and ΔW_OPL = (V - P) Kᵀ over tokens of the "
        "test text, and in brackets the median of |ΔW_kNN| / |ΔW_OPL|. The inner product's T "
        "is half of L2's (L2 at T is the inner product at T/2, but for the keys' lengths). "
        "The last column leaves the decay T W_O out."
    )
    sections.parts.append(markdown_table(header, rows))
    of_tokens = gradients.by_setting[decoding.num_neighbours, "l2", decoding.temperature]
    (of_steps,) = [each for each in gradients.pooled if each.metric == "l2"]
    for what, each in (
        ("of single tokens", of_tokens),
        (
            "of decoding steps, the tokens at one position of 32 sentences added up, "
            f"{gradients.tokens_a_step:.1f} in the mean",
            of_steps,
        ),
    ):
        sections.parts.append(
            f"With decoding's k {decoding.num_neighbours} and T {decoding.temperature:g}, L2, "
            f"{what}: mean cosine {_with_interval(each.cosine, each.cosine_interval)}, without the "
            "decay "
            f"{_with_interval(each.cosine_without_decay, each.cosine_without_decay_interval)}."
        )
    panels = {
        f"cosine, {metric}": np.array(
            [[_mean(gradients.by_setting[k, metric, t].cosine) for t in temperatures] for k in ks]
        )
        for metric in ("l2", "ip")
    }
    figures.draw_settings(
        panels,
        ks,
        temperatures,
        sections.figure("gradients"),
        f"{sections.domain}: cosine of retrieval's step and the gradient's (T of L2)",
    )
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
        f"λ {decoding.knn_weight:g}: mean KL in nats, in brackets the share of tokens, %, for "
        f"which both find the same token best. With decoding's k and T: {_agreement(used)}, median "
        f"KL {_number(used.median_kl):.2f}. Nearest to each other, of all settings, at "
        f"k {nearest.num_neighbours}, T {nearest.temperature:g}: {_agreement(nearest)}; with one "
        "neighbour the softmax over neighbours is constant, so T is a step size alone."
    )
    rows = [[f"{k}", *(_agreement(l2[k, t]) for t in temperatures)] for k in ks]
    header = ["k", *(f"T {temperature:g}" for temperature in temperatures)]
    sections.parts.append(markdown_table(header, rows))
    panels = {
        "KL, nats": np.array([[_number(l2[k, t].mean_kl) for t in temperatures] for k in ks]),
        "same best token": np.array(
            [[_number(l2[k, t].top_agreement) for t in temperatures] for k in ks]
        ),
    }
    figures.draw_settings(
        panels,
        ks,
        temperatures,
        sections.figure("relaxed"),
        f"{sections.domain}: the relaxed form against the softmax form, L2",
    )


def write_neighbours(sections: Sections, found: Mapping[str, Sequence[BucketNeighbours]]) -> None:
    """Gold among the neighbours, by frequency and representation."""
    sections.head("Gold token among the neighbours")
    sections.keep("neighbours", found)
    ks = [each.num_neighbours for each in next(iter(found.values()))[0].found]
    header = ["representation", "tokens of", "number", *(f"found at {k}, %" for k in ks)]
    header += ["mean rank", "distance of gold", "of others", "gold / others"]
    rows = []
    for name, buckets in found.items():
        for bucket in buckets:
            shares = [_percent(each.fraction) for each in bucket.found]
            largest, ratio = bucket.found[-1], bucket.distance_ratio
            if largest.low is not None:
                shares[-1] += f" [{_percent(largest.low)}, {_percent(largest.high)}]"
            rows.append(
                [
                    name,
                    BUCKETS[bucket.bucket],
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
                    "" if ratio is None else f"{ratio:.2f}",
                ]
            )
    sections.parts.append(
        "Buckets are of vocabulary units by their count in the datastore; the rank is among "
        "different tokens, of those found. In brackets 95 % by bootstrap over sentences, of the "
        "largest k. Distances have each representation's own scale; gold / others, the ratio of "
        "their means, can be compared."
    )
    sections.parts.append(markdown_table(header, rows))
    curves = {
        BUCKETS[number]: {
            name: [each.fraction for each in buckets[number].found]
            for name, buckets in found.items()
        }
        for number in range(len(BUCKETS))
    }
    figures.draw_found_at_k(
        curves,
        ks,
        sections.figure("neighbours"),
        f"{sections.domain}: gold token among the k nearest entries",
    )


def write_scaling(sections: Sections, points: Sequence[ScalePoint]) -> None:
    """What a larger datastore gives and takes."""
    sections.head("Datastore size")
    sections.keep("datastore size", points)
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
        "Nested random parts of the datastore, of whole sentences, exact search. BLEU is of greedy "
        f"translations of the test set's first {sections.num_sentences:,} sentences, its gain over "
        "the row above by paired bootstrap, in brackets 95 % intervals. Gold among 32 and search "
        f"time are of the tokens of the validation set's first {sections.num_sentences:,} "
        "sentences, which each part's k, λ and T were chosen on, too."
    )
    sections.parts.append(markdown_table(header, rows))
    figures.draw_scaling(
        {"exact search": points}, sections.figure("scaling"), f"{sections.domain}: datastore size"
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _mean(summary: object) -> float:
    return float(getattr(summary, "mean", np.nan))


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _with_interval(summary: Summary | None, interval: tuple[float, float] | None) -> str:
    if summary is None or interval is None:
        return "unknown"
    return f"{summary.mean:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _agreement(relaxed: RelaxedAgreement) -> str:
    return f"{_number(relaxed.mean_kl):.2f} ({_percent(relaxed.top_agreement)})"
