"""Checks of settings, before anything is computed with them."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real

MAX_NEIGHBOURS = 2048  # what faiss finds at once on a GPU


def check_integer(what: str, value: object, least: int = 1, most: int | None = None) -> None:
    """Rejects a value that is not an integer in this range.

    Args:
        what: Its name, as the sentence begins.
        value: What was given, maybe by the command line: text, or None.
        least: The smallest allowed.
        most: The largest; None if there is none.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{what} is {value}, but it must be an integer {allowed}.")


def check_number(
    what: str, value: object, allowed: str, fits: Callable[[float], bool] = lambda _: True
) -> None:
    """Rejects a value that is not a number, or is not allowed.

    Args:
        what: Its name, as the sentence begins.
        value: What was given.
        allowed: What it must do, as the sentence ends.
        fits: Whether it does.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not fits(value):  # type: ignore[arg-type]
        raise ValueError(f"{what} is {value}, but it must {allowed}.")


def check_recall(recall: float) -> None:
    """Rejects a recall that no index can reach, or that every index has."""
    allowed = "lie above 0 and be at most 1"
    check_number("The wanted recall", recall, allowed, lambda share: 0.0 < share <= 1.0)
