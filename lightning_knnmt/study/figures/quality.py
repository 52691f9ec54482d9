"""Figures of how well systems translate, and what more text gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_knnmt.analysis.scaling import ScalePoint
from lightning_knnmt.analysis.word_recall import BucketRecall
from lightning_knnmt.study.figures.style import (
    FiguresError,
    canvas,
    known,
    label_plainly,
    looks,
    write_across,
)

GROUP_WIDTH = 0.8  # of the bars of one bucket; the buckets are 1 apart


def draw_word_recall(
    recalls: Mapping[str, Sequence[BucketRecall]],
    path: Path,
    title: str = "Recall of reference words by their frequency in the domain",
) -> None:
    """Draws recall in each bucket as bars, a group a bucket, with 95 % intervals.

    Args:
        recalls: Each system's buckets, all with the same references.
        path: The .png file.
        title: What is shown, for example which words and which test set.
    """
    if not recalls:
        raise FiguresError("There is no system to draw: at least 1 is needed.")
    first, *others = ([(b.bucket, b.reference_words) for b in r] for r in recalls.values())
    if any(other != first for other in others):
        raise FiguresError(
            f"The systems {', '.join(recalls)} do not have the same buckets and reference words: "
            "compare them on one test set with one set of buckets."
        )
    width = GROUP_WIDTH / len(recalls)
    with canvas(path, title) as (axes,):
        for number, (system, look) in enumerate(looks(recalls)):
            estimates = [bucket.recall for bucket in recalls[system]]
            value, low, high = (
                100 * known(getattr(each, name) if each else None for each in estimates)
                for name in ("value", "low", "high")
            )
            places = np.arange(len(value)) + (number + 0.5) * width - GROUP_WIDTH / 2
            whiskers = np.maximum(0.0, [value - low, high - value])  # 1e-15 below zero happens
            axes.bar(
                places,
                np.nan_to_num(value),
                width,
                yerr=whiskers,
                color=look.colour,
                label=system,
                error_kw={"elinewidth": 0.8, "ecolor": "0.25"},
            )
        axes.set_xticks(
            range(len(first)),
            [
                f"{bucket}\n{words:,} words" if words else f"{bucket}\nno words"
                for bucket, words in first
            ],
        )
        axes.grid(visible=False, axis="x")
        axes.set(ylabel="recall, %", ylim=(0, 100), xlabel="words of the domain, by frequency")
        axes.figure.legend(loc="outside lower center", ncols=5)


def draw_domain_scores(
    scores: Mapping[str, tuple[float, float]],
    path: Path,
    title: str = "BLEU in the domain and outside of it",
) -> None:
    """Draws systems as points: right is better in the domain, up is better outside of it.

    Args:
        scores: Each system's BLEU in the domain and outside of it.
        path: The .png file.
        title: What is shown.
    """
    if not scores:
        raise FiguresError("There is no system to draw: at least 1 is needed.")
    with canvas(path, title) as (axes,):
        for system, look in looks(scores):
            inside, outside = scores[system]
            axes.plot(inside, outside, look.marker, color=look.colour, label=system, markersize=7)
        axes.set(xlabel="BLEU in the domain", ylabel="BLEU outside of the domain")
        axes.margins(0.12)
        axes.figure.legend(loc="outside right center")


class Panel(NamedTuple):
    """One quantity of `draw_scaling`."""

    label: str
    scale: str
    of: Callable[[ScalePoint], float | None]
    interval: Callable[[ScalePoint], tuple[float, float] | None] = lambda _: None


SCALING_PANELS = (
    Panel("BLEU", "linear", lambda point: point.bleu, lambda point: point.bleu_interval),
    Panel("gold token among the neighbours, %", "linear", lambda point: 100 * point.gold_recall),
    Panel("search, s per 1,000 queries", "log", lambda point: point.seconds_per_1000_queries),
    Panel("memory, MB", "log", lambda point: point.memory_bytes / 1e6),
)


def draw_scaling(
    curves: Mapping[str, Sequence[ScalePoint]],
    path: Path,
    title: str = "What a larger datastore gives and takes",
) -> None:
    """Draws BLEU with 95 % intervals, gold recall, search time and memory over the entries.

    Args:
        curves: Named measurements, for example of two indexes.
        path: The .png file.
        title: What is shown.
    """
    if not any(curves.values()):
        raise FiguresError("There is no measurement to draw: at least 1 is needed.")
    with canvas(path, title, rows=2, columns=2) as panels:
        for axes, panel in zip(panels, SCALING_PANELS, strict=True):
            for name, look in looks(curves):
                entries = [point.num_entries for point in curves[name]]
                values = known(panel.of(point) for point in curves[name])
                axes.plot(entries, values, f"{look.marker}-", color=look.colour, label=name)
                bounds = ((point.num_entries, panel.interval(point)) for point in curves[name])
                for place, interval in bounds:
                    if interval is not None:
                        axes.vlines(place, *interval, color=look.colour, linewidth=0.8)
            measured = [panel.of(point) for points in curves.values() for point in points]
            axes.set_title(panel.label)
            if all(value is None for value in measured):
                write_across(axes, "not measured")
            else:
                axes.set(xscale="log", yscale=panel.scale, xlabel="datastore entries")
                for axis in (axes.xaxis, axes.yaxis):
                    if axis.get_scale() == "log":
                        label_plainly(axis)
        handles, names = panels[-1].get_legend_handles_labels()
        panels[0].figure.legend(handles, names, loc="outside lower center", ncols=4)
