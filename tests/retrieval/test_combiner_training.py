"""Training on planted records: what must be learnt is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_knnmt.retrieval import CombinerTrainer, Neighbours, distance_offset
from lightning_knnmt.retrieval.adaptive import AdaptiveCombiner, KNNBoxCombiner
from lightning_knnmt.retrieval.errors import CombinerError
from lightning_knnmt.retrieval.record import Record
from lightning_knnmt.retrieval.tuning import score_grid

K, T, M = 4, 10.0, 1200
QUICK = CombinerTrainer(learning_rate=3e-3, max_updates=300, first_validation=50, validate_every=50)


def planted_record(low: float = 0.0) -> Record:
    """Near neighbours hold the gold token, far ones never do: the best λ is 1 or 0.

    Rows come in sentences of 6; the nearest distance is below 40 or above 60, above `low`.
    """
    generator = torch.Generator().manual_seed(2)
    is_near = torch.rand(M, generator=generator) < 0.5
    nearest = torch.where(is_near, 0.0, 60.0) + 40 * torch.rand(M, generator=generator)
    distances = low + nearest[:, None] + 5 * torch.arange(K)
    gold = torch.randint(1, 9, (M,), generator=generator, dtype=torch.int32)
    tokens = torch.where(is_near, gold, gold + 10)[:, None].expand(M, K).contiguous()
    return Record(
        tokens=tokens,
        distances=distances,
        entries=torch.arange(M * K).view(M, K),
        gold=gold,
        gold_log_probs=torch.full((M,), -2.0),
        neighbour_log_probs=torch.full((M, K), -2.0),
        sentences=torch.arange(M, dtype=torch.int32) // 6,
        queries=None,
    )


def seeded(kind: Any, offset: float = 0.0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(K, T, distance_offset=offset)


def loss_by_hand(combiner: AdaptiveCombiner, record: Record) -> float:
    """- mean log(λ p_kNN(gold) + (1 - λ) p_NMT(gold)), in float64, token by token."""
    with torch.no_grad():
        weighting = combiner(Neighbours(record.tokens.long(), record.distances, record.entries))
    total = 0.0
    for row in range(record.num_tokens):
        probs, weight = weighting.neighbour_probs[row].double(), float(weighting.knn_weight[row])
        knn_prob = sum(
            float(prob) for prob, token in zip(probs, record.tokens[row], strict=True)
            if token == record.gold[row]
        )  # fmt: skip
        total += np.log(
            weight * knn_prob + (1 - weight) * np.exp(float(record.gold_log_probs[row]))
        )
    return -total / record.num_tokens


@pytest.mark.parametrize("low", [0.0, -3000.0], ids=["l2", "ip"])
@pytest.mark.parametrize("kind", [AdaptiveCombiner, KNNBoxCombiner])
def test_it_learns_whom_to_trust_better_than_any_fixed_setting(kind: Any, low: float) -> None:
    record = planted_record(low)
    grid = score_grid(record, [1, 2, 4], np.linspace(0.05, 0.95, 19).tolist(), [1.0, T, 100.0])
    best_fixed = -grid.log_prob
    assert best_fixed > 1.0  # λ about a half is wrong for everyone; the best possible is 1.0
    combiner = seeded(kind, distance_offset(record, "l2" if low == 0.0 else "ip"))
    training = QUICK.train(combiner, record)
    assert training.best_loss < 0.85 * best_fixed
    assert training.best_loss < training.history[0].loss
    near = torch.tensor([[10.0, 15.0, 20.0, 25.0], [80.0, 85.0, 90.0, 95.0]]) + low
    ones = torch.ones(2, K, dtype=torch.long)
    trusts_near, trusts_far = combiner(Neighbours(ones, near, ones)).knn_weight[:, 0].tolist()
    assert trusts_near > 0.9
    assert trusts_far < 0.1


def test_the_loss_is_the_equation_and_the_best_weights_come_back() -> None:
    record = planted_record()
    combiner = seeded(AdaptiveCombiner)
    before = loss_by_hand(combiner, record)
    # so fast that it overshoots: the last loss is not the best
    wild = replace(QUICK, learning_rate=0.3, clip_norm=100.0, max_updates=120, validate_every=5)
    training = wild.train(combiner, record)
    assert training.history[0].loss == pytest.approx(before, rel=1e-5)
    assert training.best_loss == min(loss for _, loss in training.history)
    assert training.history[-1].loss > training.best_loss
    assert loss_by_hand(combiner, record) == pytest.approx(training.best_loss, rel=1e-5)


def test_equal_seeds_give_equal_weights_and_the_global_numbers_are_left_alone() -> None:
    record = planted_record()
    few = replace(QUICK, max_updates=30)
    state = torch.get_rng_state()
    first, again, other = (seeded(AdaptiveCombiner) for _ in range(3))
    few.train(first, record)
    with torch.inference_mode():  # as in Lightning's evaluation
        few.train(again, record)
    replace(few, seed=2).train(other, record)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [each.network.first.weight for each in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_every_sentence_is_seen_once_before_any_is_seen_again() -> None:
    record = planted_record()
    batches = replace(QUICK, batch_sentences=64)._batches(record.sentences)
    epoch = [next(batches) for _ in range(4)]  # 200 sentences
    assert [len(rows) for rows in epoch] == [64 * 6, 64 * 6, 64 * 6, 8 * 6]
    assert torch.cat(epoch).sort().values.tolist() == list(range(M))
    for rows in epoch:
        counts = record.sentences[rows].bincount()
        assert {*counts[counts > 0].tolist()} == {6}
    assert not torch.equal(next(batches), epoch[0])


def test_it_stops_when_nothing_gets_better_and_says_how_far_it_is() -> None:
    record = planted_record()
    said: list[tuple[int, float]] = []
    still = replace(
        QUICK, learning_rate=0.0, min_learning_rate=0.0, validate_every=10, stop_patience=3
    )
    training = still.train(seeded(AdaptiveCombiner), record, lambda *now: said.append(now))
    assert [update for update, _ in training.history] == [0, 50, 60, 70]
    assert training.updates == 70
    assert said == list(training.history[1:])
    assert training.seconds > 0


def test_a_combiner_for_fewer_neighbours_uses_the_nearest() -> None:
    record = planted_record()
    two = replace(
        record,
        tokens=record.tokens[:, :2],
        distances=record.distances[:, :2],
        entries=record.entries[:, :2],
    )
    few = replace(QUICK, max_updates=10)
    losses = []
    for each in (record, two):
        torch.manual_seed(0)
        losses.append(few.train(AdaptiveCombiner(2, T), each).history)
    assert losses[0] == losses[1]


def test_a_loss_that_is_not_a_number_stops_it() -> None:
    record = planted_record()
    spoilt = record.gold_log_probs.clone()
    spoilt[7] = torch.nan
    with pytest.raises(CombinerError, match="loss is nan at update 0, so its training stopped"):
        QUICK.train(seeded(AdaptiveCombiner), replace(record, gold_log_probs=spoilt))
    with pytest.raises(CombinerError, match=r"loss is \S+ at update [12], .* lower the learning"):
        replace(QUICK, learning_rate=float("inf")).train(seeded(AdaptiveCombiner), record)


def test_records_that_are_too_small() -> None:
    record = planted_record()
    with pytest.raises(CombinerError, match="weighs 8 neighbours, but only 4 were recorded"):
        QUICK.train(AdaptiveCombiner(8, T), record)
    empty = replace(record, **{name: tensor[:0] for name, tensor in record.arrays().items()})
    with pytest.raises(CombinerError, match="The record is empty"):
        QUICK.train(AdaptiveCombiner(4, T), empty)
