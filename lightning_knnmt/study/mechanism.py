"""Sections on how retrieval works: gradients, neighbours, datastore size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lightning_knnmt import figures
from lightning_knnmt.analysis import BucketNeighbours, ScalePoint
from lightning_knnmt.study.analyses import FOUND_AT, GRADIENT_NEIGHBOURS, TOKEN_BUCKETS, Gradients
from lightning_knnmt.study.report import markdown_table
from lightning_knnmt.study.sections import Sections


def write_gradients(sections: Sections, gradients: Gradients) -> None:
    """The meta-gradient against the OPL's gradient, and the relaxed form."""
    sections.head("The gradient that retrieval stands for, against the output projection's")
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
    sections.parts.append(
        "Mean cosine of ΔW_kNN = V Kᵀ - T W_O and ΔW_OPL = (V - P) Kᵀ over tokens of the "
        "test text, and in brackets the median of |ΔW_kNN| / |ΔW_OPL|. The inner product's T "
        "is half of L2's (L2 at T is the inner product at T/2, but for the keys' lengths). "
        "The last column leaves the decay T W_O out."
    )
    sections.parts.append(markdown_table(header, rows))
    for each in gradients.pooled:
        if each.cosine and each.cosine_without_decay:
            sections.parts.append(
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
        sections.figure("gradients"),
        f"{sections.domain}: cosine of retrieval's step and the gradient's (T of L2)",
    )
    _write_relaxed(sections, gradients, temperatures)


def _write_relaxed(sections: Sections, gradients: Gradients, temperatures: Sequence[float]) -> None:
    shape = (len(GRADIENT_NEIGHBOURS), len(temperatures))
    l2 = [each for each in gradients.relaxed if each.metric == "l2"]
    rows = []
    for each in gradients.relaxed:
        if each.mean_kl is not None and each.top_agreement is not None:
            numbers = [f"{each.mean_kl:.2f}", f"{100 * each.top_agreement:.1f}"]
            rows.append([each.metric, each.num_neighbours, f"{each.temperature:g}", *numbers])
    best = sorted(rows, key=lambda row: float(str(row[-2])))[:6]
    sections.parts.append(
        "The relaxed (linear) form's prediction against the mixture's, by k and T, λ "
        f"{l2[0].knn_weight:g}: the six nearest of {len(rows)} settings."
    )
    header = ["metric", "k", "T", "mean KL, nats", "same best token, %"]
    sections.parts.append(markdown_table(header, best))
    panels = {
        "KL, nats": np.array([_number(each.mean_kl) for each in l2]).reshape(shape),
        "same best token": np.array([_number(each.top_agreement) for each in l2]).reshape(shape),
    }
    figures.draw_settings(
        panels,
        GRADIENT_NEIGHBOURS,
        temperatures,
        sections.figure("relaxed"),
        f"{sections.domain}: the relaxed form against the softmax form, L2",
    )


def write_neighbours(sections: Sections, found: Mapping[str, Sequence[BucketNeighbours]]) -> None:
    """Gold among the neighbours, by frequency and representation."""
    sections.head("Gold token among the neighbours")
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
    sections.parts.append(
        "Buckets are of vocabulary units by their count in the datastore; the rank is among "
        "different tokens, of those found."
    )
    sections.parts.append(markdown_table(header, rows))
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
        sections.figure("neighbours"),
        f"{sections.domain}: gold token among the k nearest entries",
    )


def write_scaling(sections: Sections, points: Sequence[ScalePoint]) -> None:
    """What a larger datastore gives and takes."""
    sections.head("Datastore size")
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
    sections.parts.append(
        "Nested random parts of the datastore, exact search, greedy decoding, the first "
        f"{sections.num_sentences:,} sentences of the test set."
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
