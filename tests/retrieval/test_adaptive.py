"""Meta-k networks against the equations, row by row in float64; then what must hold at the edges.

Zheng et al., 2021 (arXiv:2105.13022); knn-box for the variant.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_knnmt.models import DecoderStates
from lightning_knnmt.retrieval import KNNDistribution, Neighbours
from lightning_knnmt.retrieval.adaptive import AdaptiveCombiner, KNNBoxCombiner
from lightning_knnmt.retrieval.errors import CombinerError

N, K, T, OFFSET = 29, 8, 12.0, 40.0
INF = float("inf")
KS = (1, 2, 4, 8)

Array = np.ndarray[Any, np.dtype[Any]]


def make_neighbours(low: float = 0.0, seed: int = 3) -> Neighbours:
    """Few tokens, so that they repeat; row 0 has no neighbour, row 1 three, row 2 one."""
    generator = torch.Generator().manual_seed(seed)
    distances = (torch.rand(N, K, generator=generator) * 80).sort(dim=-1).values + low
    for row, num_found in enumerate((0, 3, 1)):
        distances[row, num_found:] = INF
    tokens = torch.randint(0, 4, (N, K), generator=generator).masked_fill(distances.isinf(), 0)
    entries = torch.arange(N * K).view(N, K).masked_fill(distances.isinf(), -1)
    return Neighbours(tokens, distances, entries)


def enliven(combiner: nn.Module) -> None:
    """Weights as training might leave them: the initial ones would hide what goes wrong."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in combiner.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def network_by_hand(network: nn.Module, inputs: Array) -> Array:
    w_1, b_1, w_2, b_2 = (p.detach().double().numpy() for p in network.parameters())
    logits: Array = w_2 @ np.tanh(w_1 @ inputs + b_1) + b_2
    return logits


def softmax(values: Array) -> Array:
    powers: Array = np.exp(values - values.max())
    return powers / powers.sum()  # type: ignore[no-any-return]


def inputs_by_hand(tokens: Array, distances: Array, offset: float) -> tuple[Array, Array]:
    """[d; c] and the distances found, of one row."""
    found = distances[np.isfinite(distances)]
    filled = [d if np.isfinite(d) else found[-1] for d in distances]
    counts = [len({*tokens[: min(i, len(found))]}) for i in range(1, K + 1)]
    return np.array([d - offset for d in filled] + counts), found


def softmaxes_by_hand(found: Array, temperature: float) -> Array:
    """A softmax for each k_r, zero beyond it, [R, K]."""
    rows = np.zeros((len(KS), K))
    for row, k in zip(rows, KS, strict=True):
        row[: len(found[:k])] = softmax(-found[:k] / temperature)
    return rows


@pytest.mark.parametrize(("low", "offset"), [(0.0, 0.0), (-900.0, -900.0)])
def test_adaptive_is_what_the_equations_say(low: float, offset: float) -> None:
    combiner = AdaptiveCombiner(K, T, distance_offset=offset)
    enliven(combiner)
    neighbours = make_neighbours(low)
    probs, knn_weight = (t.detach().double().numpy() for t in combiner(neighbours))
    for row in range(1, N):
        tokens, distances = (neighbours[i][row].double().numpy() for i in (0, 1))
        inputs, found = inputs_by_hand(tokens, distances, offset)
        pi = softmax(network_by_hand(combiner.network, inputs))
        of_each = pi[1:] @ softmaxes_by_hand(found, T)  # what each adds to the mixture
        np.testing.assert_allclose(knn_weight[row, 0] * probs[row], of_each, atol=2e-6)
        np.testing.assert_allclose(knn_weight[row, 0], 1 - pi[0], atol=2e-6)


@pytest.mark.parametrize("learn_temperature", [False, True])
def test_knn_box_has_a_network_for_each_number(learn_temperature: bool) -> None:
    combiner = KNNBoxCombiner(K, T, learn_temperature=learn_temperature)
    enliven(combiner)
    neighbours = make_neighbours()
    probs, knn_weight = (t.detach().double().numpy() for t in combiner(neighbours))
    for row in range(1, N):
        tokens, distances = (neighbours[i][row].double().numpy() for i in (0, 1))
        inputs, found = inputs_by_hand(tokens, distances, 0.0)
        temperature = T
        if learn_temperature:
            temperature /= 1 + np.exp(-network_by_hand(combiner.temperature_network, inputs)[0])
        shares = softmax(network_by_hand(combiner.k_network, inputs))
        expected = shares @ softmaxes_by_hand(found, temperature)
        np.testing.assert_allclose(probs[row], expected, atol=2e-6)
        logit = network_by_hand(combiner.weight_network, inputs)[0]
        np.testing.assert_allclose(knn_weight[row, 0], 1 / (1 + np.exp(-logit)), atol=2e-6)


@pytest.fixture(params=[AdaptiveCombiner, KNNBoxCombiner])
def combiner(request: pytest.FixtureRequest) -> Any:
    made = request.param(K, T, distance_offset=OFFSET)
    enliven(made)
    return made


def test_probabilities_sum_to_one_and_nothing_found_counts_nothing(combiner: Any) -> None:
    probs, knn_weight = combiner(make_neighbours())
    torch.testing.assert_close(probs.sum(dim=-1)[1:], torch.ones(N - 1))
    assert probs[0].tolist() == [0.0] * K
    assert knn_weight[0].item() == 0.0
    assert (knn_weight[1:] > 0).all()
    assert (knn_weight < 1).all()
    assert not probs[1, 3:].any()
    assert not probs[2, 1:].any()


def test_what_stands_in_the_place_of_a_missing_neighbour_makes_no_difference(combiner: Any) -> None:
    neighbours = make_neighbours()
    missing = neighbours.distances.isinf()
    rolled = torch.randint(0, 4, (N, K), generator=torch.Generator().manual_seed(1))
    others = neighbours._replace(tokens=torch.where(missing, rolled, neighbours.tokens))
    for one, other in zip(combiner(neighbours), combiner(others), strict=True):
        assert torch.equal(one, other)


def test_any_leading_shape(combiner: Any) -> None:
    flat = make_neighbours()
    shaped = Neighbours(*(t[:28].view(4, 7, K) for t in flat))
    for one, other in zip(combiner(flat), combiner(shaped), strict=True):
        torch.testing.assert_close(one[:28].view(4, 7, -1), other)


def test_gradients_reach_every_weight_and_stay_finite(combiner: Any) -> None:
    probs, knn_weight = combiner(make_neighbours())
    (probs[:, 0] * knn_weight[:, 0]).sum().backward()
    for name, parameter in combiner.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_gradients_of_a_learnt_temperature_survive_missing_neighbours() -> None:
    combiner = KNNBoxCombiner(K, T, learn_temperature=True)
    combiner(make_neighbours()).neighbour_probs[:, 0].sum().backward()
    gradient = combiner.temperature_network.second.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.any()


def test_as_the_weight_vanishes_the_model_speaks_alone() -> None:
    """π_0 -> 1: quotients of vanishing π must not become NaN, nor λ less than nothing."""
    combiner = AdaptiveCombiner(K, T)
    neighbours = make_neighbours()
    for bias in (30.0, 300.0):
        with torch.no_grad():
            combiner.network.second.bias[0] = bias
        probs, knn_weight = combiner(neighbours)
        torch.testing.assert_close(probs.sum(dim=-1)[1:], torch.ones(N - 1))
        assert (knn_weight <= 1e-12).all()
    assert not knn_weight.any()

    class Uniform:
        def __call__(self, states: DecoderStates, rows: torch.Tensor | None = None) -> torch.Tensor:
            return torch.full((len(states.hidden), 10), -np.log(10.0))

        def top_with(self, states: DecoderStates, n: int, tokens: torch.Tensor) -> Any:
            raise AssertionError("the dense form asks for all tokens")

    class Found:
        num_neighbours = K

        def __call__(self, states: DecoderStates) -> Neighbours:
            return neighbours

    mixed = KNNDistribution(Uniform(), Found(), combiner)  # type: ignore[arg-type]
    states = DecoderStates(torch.zeros(N, 2))
    assert torch.equal(mixed(states), Uniform()(states))


def test_even_a_sure_network_leaves_the_model_a_share() -> None:
    combiner = AdaptiveCombiner(K, T)
    with torch.no_grad():
        combiner.network.second.bias[0] = -300.0
    knn_weight = combiner(make_neighbours()).knn_weight[1:]
    assert (knn_weight > 0.999999).all()
    knn_weight.neg().log1p().sum().backward()  # log(1 - λ)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in combiner.parameters())


def test_bfloat16_around_it_does_not_round_its_distances(combiner: Any) -> None:
    neighbours = make_neighbours(300.0)
    plain = combiner(neighbours)
    with torch.autocast("cpu", torch.bfloat16):
        for one, other in zip(plain, combiner(neighbours), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [AdaptiveCombiner, KNNBoxCombiner])
@pytest.mark.parametrize("k", [1, 2, 16, 32])
def test_shapes_for_every_power_of_two(kind: Any, k: int) -> None:
    combiner = kind(k, T, 5)
    neighbours = Neighbours(*(torch.arange(3 * k).view(3, k) for _ in range(3)))
    probs, knn_weight = combiner(neighbours._replace(distances=neighbours.distances.float()))
    assert (probs.shape, knn_weight.shape) == ((3, k), (3, 1))
    assert combiner.settings["hidden_dim"] == 5


def test_initial_weights_are_small_for_distances_and_larger_for_counts() -> None:
    torch.manual_seed(0)
    weight = AdaptiveCombiner(32, T).network.first.weight
    by_xavier = (2 / (32 + 32)) ** 0.5
    assert weight[:, :32].std().item() == pytest.approx(0.01 * by_xavier, rel=0.1)
    assert weight[:, 32:].std().item() == pytest.approx(0.1 * by_xavier, rel=0.1)
    weight = KNNBoxCombiner(32, T).k_network.first.weight
    assert weight[:, :32].std().item() == pytest.approx(0.01, rel=0.1)
    assert weight[:, 32:].std().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("kind", [AdaptiveCombiner, KNNBoxCombiner])
def test_what_it_cannot_be_made_with(kind: Any) -> None:
    for k in (0, 3, 12):
        with pytest.raises(CombinerError, match=rf"weigh {k} neighbours: .* power of two"):
            kind(k, T)
    for temperature in (0.0, -1.0, float("nan"), INF):
        with pytest.raises(CombinerError, match=rf"T is {temperature}, but it must be a number"):
            kind(4, temperature)
