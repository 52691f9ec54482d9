"""Measures what retrieval does: tensors and strings in, values out; no files, no plots."""

__all__: list[str] = []
