"""What one check says."""

from typing import Literal, NamedTuple

Verdict = Literal["ok", "warning", "problem"]


class Finding(NamedTuple):
    """The answer of one check.

    Attributes:
        name: What was looked at, in a word or two.
        verdict: "problem" if translating or retrieving cannot be right, "warning" if it may not be.
        text: What was found and, unless it is well, what to do.
    """

    name: str
    verdict: Verdict
    text: str


def graded(value: float, warning: float, problem: float) -> Verdict:
    """The verdict on a number of which more is worse."""
    return "problem" if value > problem else "warning" if value > warning else "ok"


def example(line: str, longest: int = 60) -> str:
    """A line short enough to be quoted."""
    return repr(line if len(line) <= longest else line[: longest - 3] + "...")
