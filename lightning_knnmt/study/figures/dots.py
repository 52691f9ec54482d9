"""Figures of one number a system: dots on lines, with intervals where there are some."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_knnmt.study.figures.style import FiguresError, canvas, looks

ROW_HEIGHT = 0.24  # inches
Interval = tuple[float, float, float]  # value, low, high


def draw_dots(
    series: Mapping[str, Mapping[str, Interval]], path: Path, label: str, title: str
) -> None:
    """Draws a line for each system, on it a dot for each series.

    Args:
        series: The systems' values with their intervals, by series; low = high = value where there
            is no interval. All have the same systems.
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
