"""The robust combiner against its equations in float64, and its noise against disturbed keys.

Jiang et al., 2022 (arXiv:2210.08808).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_knnmt.decoding import SoftmaxDistribution
from lightning_knnmt.models import DecoderStates
from lightning_knnmt.retrieval import (
    CombinerTrainer,
    FlatIndex,
    KNNDistribution,
    LocalSource,
    Neighbours,
    Retriever,
    RobustCombiner,
    label_log_probs,
)
from lightning_knnmt.retrieval import robust as robust_module
from lightning_knnmt.retrieval.adaptive import AdaptiveCombiner
from lightning_knnmt.retrieval.combiner import ModelView
from lightning_knnmt.retrieval.combiner_file import load_combiner, save_combiner
from lightning_knnmt.retrieval.errors import CombinerError
from lightning_knnmt.retrieval.record import Record, Recorder

N, K, T, M = 17, 8, 12.0, 200
INF = float("inf")


def new_combiner() -> RobustCombiner:
    """With weights as training might leave them, and a table of M entries."""
    generator = torch.Generator().manual_seed(11)
    combiner = RobustCombiner(K, T)
    for parameter in combiner.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    combiner.label_log_probs = -5 * torch.rand(M, generator=generator)
    return combiner


def retrieved() -> tuple[Neighbours, ModelView]:
    """Row 0 has no neighbour, row 1 three."""
    generator = torch.Generator().manual_seed(3)
    distances = (torch.rand(N, K, generator=generator) * 80).sort(dim=-1).values
    distances[0], distances[1, 3:] = INF, INF
    missing = distances.isinf()
    tokens = torch.randint(0, 4, (N, K), generator=generator).masked_fill(missing, 0)
    entries = torch.randint(0, M, (N, K), generator=generator).masked_fill(missing, -1)
    of_neighbours = (-4 * torch.rand(N, K, generator=generator)).masked_fill(missing, -INF)
    best = (-4 * torch.rand(N, 8, generator=generator)).sort(dim=-1, descending=True).values
    return Neighbours(tokens, distances, entries), ModelView(best, of_neighbours)


def test_it_is_what_the_equations_say() -> None:
    combiner, (neighbours, view) = new_combiner(), retrieved()
    assert combiner.label_log_probs is not None
    with torch.no_grad():
        weighting = combiner(neighbours, view)
    assert not weighting.neighbour_probs[0].any()
    assert not weighting.knn_weight[0].any()
    weights: list[Any] = [p.detach().double().numpy() for p in combiner.parameters()]
    c_1, c_1_bias, c_2, c_2_bias, w_1, w_1_bias, w_2, w_2_bias, s, s_bias = weights
    for row in range(1, N):
        distances = neighbours.distances[row].double().numpy()
        found = int(np.isfinite(distances).sum())
        filled = np.concatenate([distances[:found], np.full(K - found, distances[found - 1])])
        tokens = neighbours.tokens[row].tolist()
        counts = [len({*tokens[: min(i, found)]}) for i in range(1, K + 1)]
        knn_score, tau = w_2 @ np.tanh(w_1 @ np.array([*filled, *counts]) + w_1_bias) + w_2_bias
        there, here = np.zeros(K), np.zeros(K)
        there[:found] = combiner.label_log_probs[neighbours.entries[row, :found]].numpy()
        here[:found] = view.neighbour_log_probs[row, :found].numpy()
        beliefs = np.stack([there, here], axis=1)
        c = (np.tanh(beliefs @ c_1.T + c_1_bias) @ c_2.T + c_2_bias)[:, 0]
        powers = np.exp(c - filled * 2 / (1 + np.exp(-tau)) / T) * (np.arange(K) < found)
        nmt_score = s[0] @ np.array([*view.best_log_probs[row].tolist(), *beliefs.ravel()]) + s_bias
        weight = 1 / (1 + np.exp(nmt_score - knn_score))
        probs = weighting.neighbour_probs[row].double().numpy()
        np.testing.assert_allclose(probs, powers / powers.sum(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(float(weighting.knn_weight[row]), weight[0], rtol=1e-4)


def test_dense_and_sparse_forms_agree_and_labels_are_the_models() -> None:
    torch.manual_seed(0)
    projection = nn.Linear(6, 300)
    keys, values = torch.randn(M, 6).half(), torch.randint(0, 300, (M,))
    base = SoftmaxDistribution(projection)
    table = label_log_probs(keys.numpy(), values.numpy(), base, torch.device("cpu"))
    assert not table.requires_grad, "every chunk of logits would be kept for the gradient"
    with torch.no_grad():
        combiner = new_combiner()
        expected = projection.double()(keys.double()).log_softmax(-1)[torch.arange(M), values]
        torch.testing.assert_close(table.double(), expected, rtol=1e-5, atol=1e-5)
        combiner.label_log_probs = table
        projection.float()
        distribution = KNNDistribution(
            base, Retriever(LocalSource(FlatIndex(keys), values), K), combiner
        )
        states = DecoderStates(torch.randn(9, 6))
        dense = distribution(states)
        torch.testing.assert_close(dense.exp().sum(-1), torch.ones(9))
        log_probs, tokens = distribution.top(states, 3)
    torch.testing.assert_close(log_probs, dense.topk(3).values, rtol=1e-5, atol=1e-5)
    assert torch.equal(tokens, dense.topk(3).indices)


def test_noise_is_that_of_disturbed_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robust_module, "NOISE_DECAY", INF)
    torch.manual_seed(0)
    query, key, draws = torch.randn(64).double(), torch.randn(64).double(), 20_000
    noise = robust_module.NOISE_STD * torch.randn(draws, 64).double()
    real = (query - key - noise).square().sum(-1)
    distance = float((query - key).square().sum())
    tokens = torch.ones(draws, 1, dtype=torch.long)  # gold is there: nothing is put in front
    combiner = RobustCombiner(1, T)
    combiner.label_log_probs = torch.zeros(1)
    seen = combiner.look(
        Neighbours(tokens, torch.full((draws, 1), distance), tokens - 1),
        ModelView(torch.zeros(draws, 8), torch.zeros(draws, 1)),
    )
    generator = torch.Generator().manual_seed(1)
    ours = combiner.disturb(seen, tokens[:, 0], torch.zeros(draws), 1, generator).distances
    assert float(ours.mean()) == pytest.approx(float(real.mean()), rel=1e-3)
    assert float(ours.std()) == pytest.approx(float(real.std()), rel=0.03)


def test_gold_comes_in_front_where_no_neighbour_holds_it_and_noise_dies_away() -> None:
    combiner, (neighbours, view) = new_combiner(), retrieved()
    seen = combiner.look(neighbours, view)
    gold = torch.arange(N) % 8  # neighbours' tokens are below 4
    gold_log_probs = -torch.arange(N, dtype=torch.float32)
    early = combiner.disturb(seen, gold, gold_log_probs, 1, torch.Generator().manual_seed(5))
    holds = (seen.found & (seen.tokens == gold[:, None])).any(-1)
    put = (early.tokens[:, 0] == gold) & (early.distances[:, 0] == 0)
    assert put[~holds].all()  # at the first update's share of 0.999
    assert not put[holds].any()
    for column in (early.label_log_probs, early.nmt_log_probs):
        assert torch.equal(column[put, 0], gold_log_probs[put])
    assert torch.equal(early.found[put].sum(-1), seen.found[put].sum(-1).add(1).clamp(max=K))
    nearest = early.distances.masked_fill(~early.found, INF)
    assert torch.equal(nearest, nearest.sort(dim=-1).values)
    late = combiner.disturb(seen, gold, gold_log_probs, 10**6, torch.Generator().manual_seed(5))
    for after, before in zip(late, seen, strict=True):
        assert torch.equal(after, before)


def planted_record() -> tuple[Record, Tensor]:
    """Only what the model expected at the entries tells which neighbours hold the gold token."""
    generator = torch.Generator().manual_seed(2)
    tokens_of_text = 1200
    is_right = torch.rand(tokens_of_text, generator=generator) < 0.5
    gold = torch.randint(1, 9, (tokens_of_text,), generator=generator, dtype=torch.int32)
    record = Record(
        tokens=torch.where(is_right, gold, gold + 10)[:, None].expand(-1, K).contiguous(),
        distances=50 * torch.rand(tokens_of_text, K, generator=generator).sort(dim=-1).values,
        entries=torch.arange(tokens_of_text)[:, None].expand(-1, K).contiguous(),
        gold=gold,
        gold_log_probs=torch.full((tokens_of_text,), -2.0),
        neighbour_log_probs=torch.full((tokens_of_text, K), -2.0),
        sentences=torch.arange(tokens_of_text, dtype=torch.int32) // 6,
        queries=None,
        best_log_probs=torch.full((tokens_of_text, 8), -2.0),
    )
    return record, torch.where(is_right, -0.1, -4.0)


def test_it_learns_from_the_models_beliefs_what_distances_do_not_tell() -> None:
    record, table = planted_record()
    torch.manual_seed(0)
    combiner = RobustCombiner(K, T)
    combiner.label_log_probs = table
    quick = CombinerTrainer(
        learning_rate=1e-2, max_updates=400, first_validation=50, validate_every=50
    )
    learnt = quick.train(combiner, record)
    assert learnt.best_loss < 1.1  # the best possible is 1.0: half the tokens at 2 nats
    blind = quick.train(AdaptiveCombiner(K, T), record)
    assert blind.best_loss > 1.2


def test_the_recorder_keeps_what_it_asks_for_and_a_record_without_is_refused() -> None:
    torch.manual_seed(0)
    base = SoftmaxDistribution(nn.Linear(6, 300))
    values = torch.randint(0, 300, (M,))
    retriever = Retriever(LocalSource(FlatIndex(torch.randn(M, 6).half()), values), K)
    states, labels = DecoderStates(torch.randn(12, 6)), torch.randint(0, 300, (12,))
    recorder = Recorder(retriever, base, keep_best=8)
    recorder.write(states, labels, torch.zeros(12, dtype=torch.long))
    record = recorder.finish()
    assert record.best_log_probs is not None
    with torch.no_grad():
        expected = base(states).topk(8).values
    torch.testing.assert_close(record.best_log_probs, expected)
    combiner = RobustCombiner(K, T)
    with pytest.raises(CombinerError, match="set them before it is used"):
        CombinerTrainer().train(combiner, record)
    with pytest.raises(CombinerError, match="not recorded: record with keep_best"):
        CombinerTrainer().train(combiner, replace(record, best_log_probs=None))


def test_its_file_holds_the_weights_alone(tmp_path: Path) -> None:
    combiner, (neighbours, view) = new_combiner(), retrieved()
    save_combiner(combiner, tmp_path / "c.safetensors", {})
    loaded = load_combiner(tmp_path / "c.safetensors", num_neighbours=K)
    assert isinstance(loaded, RobustCombiner)
    assert loaded.label_log_probs is None
    loaded.label_log_probs = combiner.label_log_probs
    for one, other in zip(loaded(neighbours, view), combiner(neighbours, view), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(CombinerError, match=r"temperature T is 0\.0"):
        RobustCombiner(K, 0.0)
