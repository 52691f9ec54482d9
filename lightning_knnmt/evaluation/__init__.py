"""Scores, their certainty, and what an evaluation leaves behind."""

__all__: list[str] = []
