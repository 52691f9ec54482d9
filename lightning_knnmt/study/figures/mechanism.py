"""Figures of how retrieval works: what is among the neighbours, how near it is to fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lightning_knnmt.study.figures.style import (
    Array,
    FiguresError,
    canvas,
    known,
    looks,
    write_across,
)

NUM_BINS = 40


def draw_found_at_k(
    found: Mapping[str, Mapping[str, Sequence[float | None]]],
    num_neighbours: Sequence[int],
    path: Path,
    title: str = "Gold token among the k nearest entries",
    label: str = "k",
) -> None:
    """Draws the share of gold tokens that are found, a panel a bucket, a line a representation.

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


def draw_histograms(
    samples: Mapping[str, Array],
    path: Path,
    title: str = "Cosine of retrieval's step and the gradient's",
    label: str = "cosine",
) -> None:
    """Draws how values spread over the tokens: outlines, and the medians as dashed lines.

    Args:
        samples: Named values, [tokens]; those that are not finite are left out.
        path: The .png file.
        title: What is shown.
        label: Of the values.
    """
    finite = {name: np.asarray(each)[np.isfinite(each)] for name, each in samples.items()}
    everything = np.concatenate([np.empty(0), *finite.values()])
    with canvas(path, title) as (axes,):
        if not len(everything):
            write_across(axes, "no values")
            return
        edges = np.histogram_bin_edges(everything, NUM_BINS)
        for name, look in looks(finite):
            if not len(finite[name]):
                axes.plot([], [], color=look.colour, label=f"{name} (no values)")
                continue
            shares = 100 * np.histogram(finite[name], edges)[0] / len(finite[name])
            median = float(np.median(finite[name]))
            axes.stairs(shares, edges, color=look.colour, label=f"{name} (median {median:.3g})")
            axes.axvline(median, color=look.colour, linestyle="--", linewidth=0.8)
        axes.set(xlabel=label, ylabel="tokens, %")
        axes.figure.legend(loc="outside lower center", ncols=3)


def draw_settings(
    panels: Mapping[str, Array],
    num_neighbours: Sequence[int],
    temperatures: Sequence[float],
    path: Path,
    title: str = "Retrieval's step and the gradient's, by k and temperature",
) -> None:
    """Draws quantities over k and T as heat maps beside each other, with their numbers.

    Args:
        panels: Named quantities, for example cosine and norm ratio, or KL divergence and top-1
            agreement, each [k, T]; NaN is left blank.
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
                f"{shape[1]} of T: give one number for each pair, [k, T]."
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
    """A number that fits its field of a heat map: 218, 5.1, 0.68, 0.056."""
    size = abs(value)
    decimals = 0 if size >= 10 else 1 if size >= 1 else 2 if size >= 0.1 else 3
    return f"{round(value, decimals) + 0.0:.{decimals}f}"  # + 0.0: no -0.000
