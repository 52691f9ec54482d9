"""The settings of a search are checked when they are given."""

import re
from typing import Any

import pytest

from lightning_knnmt.decoding import BeamSearch


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beam_size": 0}, "beam_size is 0; it must be a whole number, at least 1"),
        ({"beam_size": 1.5}, "beam_size is 1.5; it must be a whole number, at least 1"),
        ({"beam_size": "abc"}, "beam_size is 'abc'; it must be a whole number, at least 1"),
        ({"min_length": None}, "min_length is None; it must be a whole number."),
        ({"max_length_offset": 0.5}, "max_length_offset is 0.5; it must be a whole number."),
        ({"length_penalty": "abc"}, "length_penalty is 'abc'; it must be a number."),
        ({"length_penalty": float("nan")}, "length_penalty is nan; it must be a number."),
        ({"max_length_ratio": "2 "}, "max_length_ratio is '2 '; it must be a number."),
    ],
)
def test_settings_of_the_wrong_kind_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        BeamSearch(**settings)


def test_whole_numbers_are_numbers() -> None:
    assert BeamSearch(length_penalty=0, max_length_ratio=1).length_penalty == 0
