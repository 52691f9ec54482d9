"""Figures are files, the same bytes twice, and hold the numbers that they were given."""

from __future__ import annotations

import dataclasses
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_knnmt.analysis.scaling import ScalePoint
from lightning_knnmt.analysis.word_recall import BucketRecall, Estimate
from lightning_knnmt.retrieval import FixedCombiner
from lightning_knnmt.study.figures import charts
from lightning_knnmt.study.figures.style import COLOURS, FiguresError, canvas, looks


def bucket(name: str, words: int, *estimate: float) -> BucketRecall:
    return BucketRecall(name, 5, words, 0, Estimate(*estimate) if estimate else None)


RECALLS = {
    "base": [bucket("top 1 %", 900, 0.7, 0.65, 0.72), bucket("unseen", 0)],
    "kNN-MT": [bucket("top 1 %", 900, 0.8, 0.75, 0.86), bucket("unseen", 0)],
}
SCORES = {"base": (30.5, 36.0), "kNN-MT": (45.25, 33.0), "fine-tuned": (46.0, 25.5)}
POINT = ScalePoint(
    *(0.1, 1000, "exact", 0.8, 0.6, FixedCombiner(8, 0.5, 10.0), -2.0, 0.25, 4_000_000),
    bleu=31.0,
    bleu_interval=(30.25, 31.5),
    bleu_gain=None,
)
LARGER = dataclasses.replace(
    POINT, share=1.0, num_entries=10_000, gold_recall=0.75, bleu=None, bleu_interval=None
)
CURVES = {"exact": [POINT, LARGER], "IVF": [dataclasses.replace(POINT, gold_recall=0.5)]}
KS = (1, 2, 4, 8)
FOUND: dict[str, dict[str, list[float | None]]] = {
    "top 1 %": {"base": [0.5, 0.6, 0.7, 0.75], "adapted": [0.6, 0.7, None, 0.9]},
    "5-20 %": {"base": [0.2, 0.3, 0.35, 0.4]},
    "unseen": {"base": [None] * 4, "adapted": [None] * 4},
    "all": {"base": [0.4, 0.5, 0.6, 0.7], "adapted": [0.5, 0.6, 0.7, 0.8]},
}
RNG = np.random.default_rng(1)
PANELS = {"cosine": RNG.random((4, 3)), "norm ratio": np.full((4, 3), np.nan)}
PANELS["norm ratio"][2, 1] = 0.123
DOTS = {
    "after": {"base": (30.0, 29.0, 31.5), "kNN-MT": (40.0, 39.0, 41.0)},
    "before": {"base": (30.0, 30.0, 30.0), "kNN-MT": (38.0, 38.0, 38.0)},
}
TEMPERATURES = (10.0, 100.0, 2.5e4)

DRAWINGS: dict[str, Callable[[Path], None]] = {
    "recall": lambda path: charts.draw_word_recall(RECALLS, path),
    "domains": lambda path: charts.draw_domain_scores(SCORES, path),
    "scaling": lambda path: charts.draw_scaling(CURVES, path),
    "found": lambda path: charts.draw_found_at_k({"5-20 %": FOUND["5-20 %"]}, KS, path),
    "settings": lambda path: charts.draw_settings(PANELS, KS, TEMPERATURES, path),
    "dots": lambda path: charts.draw_dots(DOTS, path, "BLEU", "title"),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_figure_is_a_png_that_is_the_same_twice(name: str, tmp_path: Path) -> None:
    first, second = tmp_path / "new folder" / "one.png", tmp_path / "two.png"
    DRAWINGS[name](first)
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "red"}):  # a user's own taste
        DRAWINGS[name](second)
    image = first.read_bytes()
    assert image == second.read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", image[16:24])
    assert width == 1080
    assert 200 < height < 1080
    assert not any(chunk in image for chunk in (b"tEXt", b"tIME", b"iTXt"))
    assert [path.name for path in first.parent.iterdir()] == ["one.png"]


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """Keeps the panels of what a test draws, and writes no file."""
    kept: list[Axes] = []

    @contextmanager
    def keeping(
        path: Path, title: str, rows: int = 1, columns: int = 1, height: float = 1.0
    ) -> Iterator[list[Axes]]:
        kept.extend(Figure(layout="constrained").subplots(rows, columns, squeeze=False).flat)
        yield kept[-rows * columns :]

    monkeypatch.setattr(charts, "canvas", keeping)
    return kept


def points(line: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def test_bars_are_recalls_with_their_intervals(panels: list[Axes], tmp_path: Path) -> None:
    DRAWINGS["recall"](tmp_path / "x.png")
    (axes,) = panels
    heights = [[bar.get_height() for bar in bars.patches] for bars in axes.containers[1::2]]  # type: ignore[attr-defined]
    np.testing.assert_allclose(heights, [[70, 0], [80, 0]])
    segments = [lines.get_segments()[0][:, 1] for lines in axes.collections]  # type: ignore[attr-defined]
    np.testing.assert_allclose(segments, [[65, 72], [75, 86]])
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "top 1 %\n900 words",
        "unseen\nno words",
    ]


def test_points_are_scores(panels: list[Axes], tmp_path: Path) -> None:
    DRAWINGS["domains"](tmp_path / "x.png")
    assert {line.get_label(): points(line) for line in panels[0].lines} == {
        system: [score] for system, score in SCORES.items()
    }


def test_curves_are_measurements(panels: list[Axes], tmp_path: Path) -> None:
    DRAWINGS["scaling"](tmp_path / "x.png")
    bleu, recall, seconds, memory = panels
    np.testing.assert_array_equal(points(bleu.lines[0]), [(1000, 31.0), (10_000, np.nan)])
    whiskers = [lines.get_segments() for lines in bleu.collections]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(whiskers, [[[(1000, 30.25), (1000, 31.5)]]] * 2)  # one a curve
    assert not any(axes.collections for axes in (recall, seconds, memory))
    assert points(recall.lines[0]) == [(1000, 60.0), (10_000, 75.0)]
    assert points(recall.lines[1]) == [(1000, 50.0)]
    assert points(seconds.lines[0]) == [(1000, 0.25), (10_000, 0.25)]
    assert points(memory.lines[0]) == [(1000, 4.0), (10_000, 4.0)]
    assert [axes.get_xscale() for axes in panels] == ["log"] * 4
    label = bleu.xaxis.get_major_formatter()
    assert [label(x) for x in (0.05, 1, 20, 5000, 2e6)] == ["0.05", "1", "20", "5k", "2M"]
    assert [axes.get_yscale() for axes in panels] == ["linear", "linear", "log", "log"]


def test_what_was_not_measured_is_said(panels: list[Axes], tmp_path: Path) -> None:
    charts.draw_scaling({"exact": [LARGER]}, tmp_path / "x.png")
    assert [text.get_text() for text in panels[0].texts] == ["not measured"]
    panels.clear()
    charts.draw_found_at_k(FOUND, KS, tmp_path / "x.png")
    assert [text.get_text() for text in panels[2].texts] == ["no words"]
    expected = [(1, 60.0), (2, 70.0), (4, np.nan), (8, 90.0)]
    np.testing.assert_allclose(points(panels[0].lines[1]), expected)
    assert len(panels) == 6
    assert [axes.axison for axes in panels] == [True] * 4 + [False] * 2


def test_heat_maps_hold_their_numbers_k_upwards(panels: list[Axes], tmp_path: Path) -> None:
    DRAWINGS["settings"](tmp_path / "x.png")
    cosine, ratio = panels
    np.testing.assert_array_equal(cosine.images[0].get_array(), PANELS["cosine"])
    written = [text.get_text() for text in cosine.texts]
    assert all(
        len(text) == 4 or value < 0.1
        for text, value in zip(written, PANELS["cosine"].flat, strict=False)
    )
    np.testing.assert_allclose([*map(float, written)], PANELS["cosine"].flat, atol=0.005)
    (only,) = ratio.texts
    assert (only.get_text(), only.get_position()) == ("0.12", (1, 2))
    assert [label.get_text() for label in cosine.get_yticklabels()] == ["1", "2", "4", "8"]
    assert [label.get_text() for label in cosine.get_xticklabels()] == ["10", "100", "25000"]


def test_numbers_fit_the_fields_of_heat_maps(panels: list[Axes], tmp_path: Path) -> None:
    values = np.array([[10326.1, 5.06, 0.684, 0.0561, -0.0002, -0.57]])
    charts.draw_settings({"x": values}, [1], range(6), tmp_path / "x.png")
    written = [text.get_text() for text in panels[0].texts]
    assert written == ["10326", "5.1", "0.68", "0.056", "0.000", "-0.57"]


def test_dots_are_values_and_their_intervals(panels: list[Axes], tmp_path: Path) -> None:
    DRAWINGS["dots"](tmp_path / "x.png")
    lines = [points(line) for line in panels[0].lines]
    assert lines[:4] == [[(29.0, 0), (31.5, 0)], [(30.0, 0)], [(39.0, 1), (41.0, 1)], [(40.0, 1)]]
    assert lines[7] == [(38.0, 1)]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["base", "kNN-MT"]


def test_long_titles_stay_inside_of_the_figure(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    with canvas(path, "Adapted to law: " + "BLEU in the domain " * 6):
        pass
    pixels = mpl.image.imread(path)
    assert (pixels[:, 0] == 1).all()
    assert (pixels[:, -1] == 1).all()


def test_many_names_have_different_looks() -> None:
    given = looks(str(i) for i in range(56))
    assert len({look for _, look in given}) == 56
    assert [look.colour for _, look in given[:7]] == list(COLOURS)


def test_a_failed_drawing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "old.png"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), canvas(path, "title"):
        1 / 0  # noqa: B018
    assert path.read_bytes() == b"old"
    assert mpl.rcParams["savefig.dpi"] == mpl.rcParamsDefault["savefig.dpi"]


REFUSALS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "ending": (r"x\.pdf.*\.png", lambda p: charts.draw_domain_scores(SCORES, p / "x.pdf")),
    "no system": ("system", lambda p: charts.draw_word_recall({}, p / "x.png")),
    "no scores": ("system", lambda p: charts.draw_domain_scores({}, p / "x.png")),
    "no points": ("measurement", lambda p: charts.draw_scaling({"a": []}, p / "x.png")),
    "no bucket": ("bucket", lambda p: charts.draw_found_at_k({}, KS, p / "x.png")),
    "no panel": ("quantity", lambda p: charts.draw_settings({}, KS, TEMPERATURES, p / "x.png")),
    "other words": (
        "base, other",
        lambda p: charts.draw_word_recall(
            {"base": RECALLS["base"], "other": RECALLS["base"][:1]}, p / "x.png"
        ),
    ),
    "no dots": ("system", lambda p: charts.draw_dots({}, p / "x.png", "BLEU", "title")),
    "other systems": (
        "before .*base, .*base, kNN-MT",
        lambda p: charts.draw_dots(
            DOTS | {"before": {"base": (1.0, 1.0, 1.0)}}, p / "x.png", "BLEU", "title"
        ),
    ),
    "other k": (
        "base has 4 .*'top 1 %'.* 3 ",
        lambda p: charts.draw_found_at_k(FOUND, KS[:3], p / "x.png"),
    ),
    "other shape": (
        r"cosine .*\[4, 3\].* 4 .* 2 ",
        lambda p: charts.draw_settings(PANELS, KS, TEMPERATURES[:2], p / "x.png"),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_makes_no_figure_is_rejected(name: str, tmp_path: Path) -> None:
    message, draw = REFUSALS[name]
    with pytest.raises(FiguresError, match=message):
        draw(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_matplotlib_may_be_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FiguresError, match=r"lightning-knnmt\[plots\]"):
        charts.draw_domain_scores(SCORES, tmp_path / "x.png")
