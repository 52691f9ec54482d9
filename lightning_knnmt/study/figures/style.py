"""The style of all figures, and how a figure becomes a file."""

from __future__ import annotations

import importlib.util
import io
import itertools
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lightning_knnmt.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Array = np.ndarray[Any, np.dtype[Any]]

# Okabe and Ito, 2008, "Color universal design": distinct with every kind of colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = "osD^vP*X"
WIDTH = 7.2  # inches: 1,080 pixels, the width of a page of Markdown
PANEL_HEIGHT = 2.8
TITLE_LENGTH = 80  # characters of a line
STYLE: Any = {  # matplotlib types its keys as literals
    "font.size": 9,
    "figure.titlesize": 10,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.markersize": 4,
    "savefig.dpi": 150,
    "image.cmap": "cividis",  # readable by lightness alone
}


class FiguresError(ValueError):
    """Values or a path that no figure can be made of, or no matplotlib."""


class Look(NamedTuple):
    """How one system is drawn; markers differ too, for prints without colour."""

    colour: str
    marker: str


def looks(names: Iterable[str]) -> list[tuple[str, Look]]:
    """Gives each name a look, which depends on its position alone."""
    cycle = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    return [(name, Look(*look)) for name, look in zip(names, cycle, strict=False)]


@contextmanager
def canvas(
    path: Path, title: str, rows: int = 1, columns: int = 1, height: float = PANEL_HEIGHT
) -> Iterator[list[Axes]]:
    """Yields panels to draw in, and writes them as a PNG unless something is raised.

    The same values give the same bytes, whatever the user's settings of matplotlib: neither time
    nor versions are written.

    Args:
        path: The .png file; it and its folder need not exist.
        title: What is shown.
        rows: Rows of panels.
        columns: Columns of panels.
        height: Of a panel, in inches.

    Yields:
        The panels, row by row.

    Raises:
        FiguresError: If the path does not end in .png, or matplotlib is not installed.
    """
    if path.suffix != ".png":
        raise FiguresError(f"{path} must end in .png, the only format of figures.")
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        size = (WIDTH, height * rows + 0.4)
        figure = Figure(figsize=size, layout="constrained")  # no pyplot, no display
        figure.suptitle(textwrap.fill(title, TITLE_LENGTH), fontweight="bold")
        yield list(figure.subplots(rows, columns, squeeze=False).flat)
        image = io.BytesIO()
        figure.savefig(image, format="png", metadata={"Software": None})
    write_atomically(path, image.getvalue())


def require_matplotlib() -> None:
    """Checks that figures can be drawn, without importing matplotlib yet.

    Raises:
        FiguresError: If it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise FiguresError(
            "Figures need matplotlib: install it with `pip install 'lightning-knnmt[plots]'`."
        )


def known(values: Iterable[float | None]) -> Array:
    """Replaces None by NaN, which matplotlib leaves out."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def label_plainly(axis: Axis) -> None:
    """Labels a logarithmic axis 0.02, 0.5, 10, 5k instead of in powers of ten."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator

    thousands = EngFormatter(sep="")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < 1 else thousands(x)))


def write_across(axes: Axes, text: str) -> None:
    """Writes in an empty panel why it is empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.4")
    axes.set(xticks=[], yticks=[])
