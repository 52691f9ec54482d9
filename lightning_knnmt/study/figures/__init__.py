"""Figures for reports: results in, a PNG out. Only this folder imports matplotlib."""

from lightning_knnmt.study.figures.charts import (
    draw_domain_scores,
    draw_dots,
    draw_found_at_k,
    draw_scaling,
    draw_settings,
    draw_word_recall,
)
from lightning_knnmt.study.figures.style import FiguresError, require_matplotlib

__all__ = [
    "FiguresError",
    "draw_domain_scores",
    "draw_dots",
    "draw_found_at_k",
    "draw_scaling",
    "draw_settings",
    "draw_word_recall",
    "require_matplotlib",
]
