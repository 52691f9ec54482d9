"""Figures for reports: results in, a PNG out; the only room that knows matplotlib."""

from lightning_knnmt.study.figures.dots import draw_dots
from lightning_knnmt.study.figures.mechanism import (
    draw_found_at_k,
    draw_histograms,
    draw_settings,
)
from lightning_knnmt.study.figures.quality import (
    draw_domain_scores,
    draw_scaling,
    draw_word_recall,
)
from lightning_knnmt.study.figures.style import (
    FiguresError,
)

__all__ = [
    "FiguresError",
    "draw_domain_scores",
    "draw_dots",
    "draw_found_at_k",
    "draw_histograms",
    "draw_scaling",
    "draw_settings",
    "draw_word_recall",
]
