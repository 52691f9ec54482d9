"""Figures for reports: results in, a PNG out; the only room that knows matplotlib."""

from lightning_knnmt.study.figures.charts import (
    draw_domain_scores,
    draw_dots,
    draw_found_at_k,
    draw_scaling,
    draw_settings,
    draw_word_recall,
)
from lightning_knnmt.study.figures.style import FiguresError

__all__ = [
    "FiguresError",
    "draw_domain_scores",
    "draw_dots",
    "draw_found_at_k",
    "draw_scaling",
    "draw_settings",
    "draw_word_recall",
]
