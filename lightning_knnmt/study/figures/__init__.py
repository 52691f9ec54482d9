"""Figures for reports: results in, a PNG out. Only this folder imports matplotlib."""

__all__: list[str] = []
