"""kNN-MT against the paper's equations, in NumPy and float64, written for reading.

Khandelwal et al., 2021 (arXiv:2010.00710), equations 2 and 3; the attention form and the identity
between squared distance and inner product follow from them.
"""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lightning_knnmt.models import DecoderStates
from lightning_knnmt.retrieval import (
    FixedCombiner,
    FlatIndex,
    KNNDistribution,
    LocalSource,
    Metric,
    Retriever,
)

Array = npt.NDArray[np.float64]
DIM, VOCAB, ENTRIES = 10, 17, 80


def softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def knn_probs(query: Array, keys: Array, values: Array, k: int, temperature: float) -> Array:
    """p_kNN(y) ∝ Σ over the k nearest with value y of exp(-|h - k_i|² / T)."""
    distances = np.array([np.sum((query - key) ** 2) for key in keys])
    nearest = np.argsort(distances)[:k]
    probs = np.zeros(VOCAB)
    for entry in nearest:
        probs[values[entry]] += np.exp(-(distances[entry] - distances[nearest[0]]) / temperature)
    return probs / probs.sum()


def attention_probs(query: Array, keys: Array, values: Array, k: int, temperature: float) -> Array:
    """p_kNN = V_m softmax(K_mᵀ h / T): attention whose values are one-hot."""
    nearest = np.argsort(-keys @ query)[:k]
    one_hot = np.eye(VOCAB)[:, values[nearest]]  # V_m
    return one_hot @ softmax(keys[nearest] @ query / temperature)


class Softmax:
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, states: DecoderStates, rows: Tensor | None = None) -> Tensor:
        return (states.hidden @ self.weight.T).log_softmax(-1)

    def top_with(self, states: DecoderStates, n: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("these equations are of the dense form")


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(
    ("k", "lambda_", "temperature"), [(1, 0.5, 1.0), (8, 0.7, 10.0), (80, 0.3, 3.0)]
)
def test_the_mixture(metric: Metric, k: int, lambda_: float, temperature: float) -> None:
    keys, values = torch.randn(ENTRIES, DIM).half(), torch.randint(0, VOCAB, (ENTRIES,))
    weight, hidden = torch.randn(VOCAB, DIM), torch.randn(6, DIM).half().float()
    distribution = KNNDistribution(
        Softmax(weight),
        Retriever(LocalSource(FlatIndex(keys, metric), values), k),
        FixedCombiner(k, lambda_, temperature),
    )
    probs = distribution(DecoderStates(hidden)).exp()
    equation = knn_probs if metric == "l2" else attention_probs
    for row, query in enumerate(hidden.double().numpy()):
        p_knn = equation(query, keys.double().numpy(), values.numpy(), k, temperature)
        p_nmt = softmax(weight.double().numpy() @ query)
        p = lambda_ * p_knn + (1 - lambda_) * p_nmt
        np.testing.assert_allclose(probs[row].numpy(), p, atol=2e-6)


def test_squared_distance_is_inner_product_at_half_the_temperature_and_a_bias() -> None:
    """-|h - k|²/T = h·k/(T/2) - |k|²/T - |h|²/T, and the last term is the same for all keys."""
    keys, query, temperature = torch.randn(ENTRIES, DIM), torch.randn(1, DIM), 7.0
    squared, order = FlatIndex(keys).search(query, ENTRIES)
    negated, by_product = FlatIndex(keys, "ip").search(query, ENTRIES)
    inner = torch.empty(ENTRIES).scatter_(0, by_product[0], -negated[0])
    bias = -keys.square().sum(1) / temperature
    probs = (inner / (temperature / 2) + bias).softmax(0)
    torch.testing.assert_close((-squared[0] / temperature).softmax(0), probs[order[0]])


def test_keys_of_one_length_make_both_metrics_one() -> None:
    """After a layer norm keys have nearly the same length: L2 at T is then IP at T/2."""
    keys = torch.nn.functional.normalize(torch.randn(ENTRIES, DIM), dim=1) * 4
    values, hidden = torch.randint(0, VOCAB, (ENTRIES,)), torch.randn(5, DIM)
    weight = torch.randn(VOCAB, DIM)
    by_distance, by_product = (
        KNNDistribution(
            Softmax(weight),
            Retriever(LocalSource(FlatIndex(keys, metric), values), 6),
            FixedCombiner(6, 0.5, temperature),
        )(DecoderStates(hidden))
        for metric, temperature in (("l2", 6.0), ("ip", 3.0))
    )
    torch.testing.assert_close(by_distance, by_product)
