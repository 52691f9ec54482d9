import math

import torch

from lightning_knnmt.models.positions import Positions, sinusoidal_table


def test_table_is_sines_then_cosines_of_geometric_wavelengths() -> None:
    table = sinusoidal_table(num_positions=50, dim=8)
    for position in (0, 1, 7, 49):
        for i in range(4):
            angle = position * math.exp(-i * math.log(10000) / 3)
            assert math.isclose(table[position, i], math.sin(angle), abs_tol=1e-6)
            assert math.isclose(table[position, 4 + i], math.cos(angle), abs_tol=1e-6)


def test_the_papers_waves_end_before_fairseqs() -> None:
    table = sinusoidal_table(num_positions=50, dim=8, kind="sinusoidal_paper")
    for position in (0, 1, 7, 49):
        for i in range(4):
            angle = position / 10000 ** (2 * i / 8)
            assert math.isclose(table[position, i], math.sin(angle), abs_tol=1e-6)
            assert math.isclose(table[position, 4 + i], math.cos(angle), abs_tol=1e-6)


def test_left_and_right_padding_give_the_same_vectors() -> None:
    positions = Positions("sinusoidal", num_positions=10, dim=8, offset=2)
    right = torch.tensor([[True, True, True, False, False]])
    left = torch.tensor([[False, False, True, True, True]])
    assert torch.equal(positions.of_tokens(right)[:, :3], positions.of_tokens(left)[:, 2:])
    assert torch.equal(positions.of_tokens(right)[0, :3], positions.first(3))
    assert torch.equal(positions.of_tokens(right)[0, 2], positions.at(2))


def test_offset_shifts_the_table() -> None:
    shifted = Positions("sinusoidal", num_positions=10, dim=8, offset=2)
    assert torch.equal(shifted.first(5), sinusoidal_table(7, 8)[2:])
    assert len(shifted.first(10)) == 10


def test_only_learned_positions_are_weights() -> None:
    learned = Positions("learned", num_positions=10, dim=8, offset=1)
    computed = Positions("sinusoidal", num_positions=10, dim=8, offset=1)
    assert {name: list(p.shape) for name, p in learned.state_dict().items()} == {"table": [11, 8]}
    assert computed.state_dict() == {}
    assert list(computed.parameters()) == []
