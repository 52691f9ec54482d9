import hashlib

import torch

from lightning_knnmt.models import digest


def test_it_is_the_hash_of_settings_names_types_shapes_and_bits() -> None:
    expected = hashlib.sha256(b'{"a": 1, "b": [2]}')
    expected.update(b"w torch.float32 [1, 2]" + b"\x00\x00\x80\x3f\x00\x00\x00\x40")
    weights = {"w": torch.tensor([[1.0, 2.0]])}
    assert digest({"b": [2], "a": 1}, weights) == expected.hexdigest()


def test_everything_counts_but_the_order_of_names() -> None:
    one, two = torch.arange(4.0), torch.arange(6.0)
    numbers = [
        digest({}, {"a": one, "b": two}),
        digest({"k": 1}, {"a": one, "b": two}),
        digest({}, {"a": one, "c": two}),
        digest({}, {"a": two, "b": one}),
        digest({}, {"a": one.view(2, 2), "b": two}),
        digest({}, {"a": one.bfloat16(), "b": two}),
    ]
    assert len(set(numbers)) == len(numbers)
    assert digest({}, {"b": two, "a": one}) == numbers[0]


def test_a_view_is_what_it_shows() -> None:
    whole = torch.arange(6.0).view(2, 3)
    assert digest({}, {"w": whole.T}) == digest({}, {"w": whole.T.clone()})
