"""The charts of reports: quality, datastore size, neighbours, heat maps, dots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lightning_knnmt.study.figures.style import (
    Array,
    FiguresError,
    canvas,
    known,
    label_plainly,
    looks,
    write_across,
)

if TYPE_CHECKING:
    from lightning_knnmt.analysis.scaling import ScalePoint
    from lightning_knnmt.analysis.word_recall import BucketRecall

GROUP_WIDTH = 0.8  # of the bars of one bucket; the buckets are 1 apart


def draw_word_recall(
    recalls: Mapping[str, Sequence[BucketRecall]],
    path: Path,
    title: str = "Recall of reference words by their frequency in the domain",
) -> None:
    """Draws recall as bars with 95 % intervals, one group of bars for each bucket.

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
    """Draws systems as points: further right is better in the domain, further up outside of it.

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
    """One quantity in `draw_scaling`."""

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
    """Draws BLEU with 95 % intervals, gold recall, search time and memory by number of entries.

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


def draw_found_at_k(
    found: Mapping[str, Mapping[str, Sequence[float | None]]],
    num_neighbours: Sequence[int],
    path: Path,
    title: str = "Gold token among the k nearest entries",
    label: str = "k",
) -> None:
    """Draws the share of gold tokens that are found: panels are buckets, lines representations.

    Args:
        found: For each bucket and representation the shares, one for each k; None where unknown.
        num_neighbours: The values of k, ascending.
        path: The .png file.
        title: What is shown.
        label: Of the horizontal axis: k, or a rank.
    """
    if not found:
        raise FiguresError("There is no bucket to draw: at least 1 is needed.")
    for bucket, curves in found.items():
        for name, shares in curves.items():
            if len(shares) != len(num_neighbours):
                raise FiguresError(
                    f"{name} has {len(shares)} shares in bucket {bucket!r}, but there are "
                    f"{len(num_neighbours)} values of k: give one for each."
                )
    names = dict(looks(dict.fromkeys(name for curves in found.values() for name in curves)))
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    with canvas(path, title, rows, columns) as panels:
        for axes, (bucket, curves) in zip(panels, found.items(), strict=False):
            axes.set_title(bucket)
            if all(share is None for shares in curves.values() for share in shares):
                write_across(axes, "no words")
                continue
            for name, shares in curves.items():
                look = names[name]
                style = f"{look.marker}-"
                axes.plot(num_neighbours, 100 * known(shares), style, color=look.colour)
            axes.set_xscale("log", base=2)
            axes.set_xticks(num_neighbours, [f"{k}" for k in num_neighbours])
            axes.set(xlabel=label, ylabel="found, %", ylim=(0, 100))
        for axes in panels[len(found) :]:
            axes.set_axis_off()
        lines = [
            panels[0].plot([], [], f"{look.marker}-", color=look.colour)[0]
            for look in names.values()
        ]
        panels[0].figure.legend(lines, list(names), loc="outside lower center", ncols=4)


def draw_settings(
    panels: Mapping[str, Array],
    num_neighbours: Sequence[int],
    temperatures: Sequence[float],
    path: Path,
    title: str = "Retrieval's step and the gradient's, by k and temperature",
) -> None:
    """Draws quantities by k and T as heat maps side by side, with their values.

    Args:
        panels: Named quantities, for example cosine and norm ratio, or KL divergence and top-1
            agreement, each [k, T]; NaN stays blank.
        num_neighbours: The values of k.
        temperatures: The values of T.
        path: The .png file.
        title: What is shown.
    """
    if not panels:
        raise FiguresError("There is no quantity to draw: at least 1 is needed.")
    shape = (len(num_neighbours), len(temperatures))
    for name, values in panels.items():
        if values.shape != shape:
            raise FiguresError(
                f"{name} has shape {list(values.shape)}, but there are {shape[0]} values of k and "
                f"{shape[1]} of T: give one value for each pair, [k, T]."
            )
    with canvas(path, title, columns=len(panels)) as all_axes:
        for axes, (name, values) in zip(all_axes, panels.items(), strict=True):
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", origin="lower")
            for (row, column), value in np.ndenumerate(values):
                if np.isfinite(value):
                    red, green, blue, _ = image.to_rgba(value)
                    is_dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                    ink = "white" if is_dark else "black"
                    axes.text(
                        column, row, _short(value), ha="center", va="center", color=ink, fontsize=8
                    )
            axes.set_xticks(range(shape[1]), [f"{t:g}" for t in temperatures])
            axes.set_yticks(range(shape[0]), [f"{k}" for k in num_neighbours])
            axes.set(title=name, xlabel="temperature T", ylabel="neighbours k")


def _short(value: float) -> str:
    """A value that fits its field of a heat map: 218, 5.1, 0.68, 0.056."""
    size = abs(value)
    decimals = 0 if size >= 10 else 1 if size >= 1 else 2 if size >= 0.1 else 3
    return f"{round(value, decimals) + 0.0:.{decimals}f}"  # + 0.0: no -0.000


ROW_HEIGHT = 0.24  # inches
Interval = tuple[float, float, float]  # value, low, high


def draw_dots(
    series: Mapping[str, Mapping[str, Interval]], path: Path, label: str, title: str
) -> None:
    """Draws a row for each system, with a dot for each series.

    Args:
        series: The systems' values with intervals, by series; without an interval, low and high are
            the value. All series have the same systems.
        path: The .png file.
        label: Of the values.
        title: What is shown.
    """
    systems = [*next(iter(series.values()), {})]
    if not systems:
        raise FiguresError("There is no system to draw: at least 1 is needed.")
    for name, values in series.items():
        if [*values] != systems:
            raise FiguresError(
                f"{name} has the systems {', '.join(values)}, but the first series has "
                f"{', '.join(systems)}: give the same to all."
            )
    with canvas(path, title, height=ROW_HEIGHT * len(systems) + 0.9) as (axes,):
        for name, look in looks(series):
            for row, system in enumerate(systems):
                value, low, high = series[name][system]
                axes.plot([low, high], [row, row], color=look.colour, linewidth=1)
                axes.plot(value, row, look.marker, color=look.colour, markersize=5)
        axes.set_yticks(range(len(systems)), systems)
        axes.set(xlabel=label, ylim=(len(systems) - 0.5, -0.5))  # the first one on top
        if len(series) > 1:
            lines = [
                axes.plot([], [], look.marker, color=look.colour)[0] for _, look in looks(series)
            ]
            axes.figure.legend(lines, list(series), loc="outside lower center", ncols=4)
