"""kNN-MT as a distribution: the sparse form equals the dense one, and the invariants hold."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_knnmt.decoding import SoftmaxDistribution
from lightning_knnmt.models import DecoderStates
from lightning_knnmt.retrieval import (
    FixedCombiner,
    FlatIndex,
    KNNDistribution,
    LocalSource,
    Metric,
    Neighbours,
    Retriever,
)
from lightning_knnmt.retrieval.combiner import ModelView, Weighting

DIM, VOCAB, ENTRIES = 8, 20, 60


class Softmax:
    """The model's own distribution, in its simplest form."""

    def __init__(self) -> None:
        self.output_projection = nn.Linear(DIM, VOCAB).requires_grad_(False)

    def __call__(self, states: DecoderStates, rows: Tensor | None = None) -> Tensor:
        return self.output_projection(states.hidden).log_softmax(-1)

    def top_with(self, states: DecoderStates, n: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = self(states)
        best = log_probs.topk(n, dim=-1)
        some = log_probs.gather(1, tokens)
        return torch.cat([best.values, some], 1), torch.cat([best.indices, tokens], 1)


class Patchy:
    """Loses neighbours: row r keeps r of them."""

    metric: Metric = "l2"
    description = "patchy"
    num_bytes = 0

    def __init__(self, index: FlatIndex) -> None:
        self.index = index

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        distances, entries = self.index.search(queries, k)
        lost = torch.arange(k) >= torch.arange(len(queries)).unsqueeze(1)
        return distances.masked_fill(lost, float("inf")), entries.masked_fill(lost, -1)


class RowByRow:
    """A combiner that trusts the datastore more from row to row, from λ = 0 to λ = 1."""

    num_best = 0

    def __init__(self, num_neighbours: int) -> None:
        self.num_neighbours = num_neighbours

    def __call__(self, neighbours: Neighbours, view: ModelView | None = None) -> Weighting:
        rows = len(neighbours.tokens)
        probs = (-neighbours.distances).softmax(-1)
        return Weighting(probs, torch.linspace(0, 1, rows).unsqueeze(1))


def random_states(*shape: int) -> DecoderStates:
    return DecoderStates(torch.randn(*shape, DIM))


@pytest.fixture
def base() -> Softmax:
    return Softmax()


@pytest.fixture
def keys() -> Tensor:
    return torch.randn(ENTRIES, DIM).half()


@pytest.fixture
def values() -> Tensor:
    """Few different tokens, so that neighbours share them."""
    return torch.randint(0, 6, (ENTRIES,), dtype=torch.int32)


def knn(
    base: Softmax, keys: Tensor, values: Tensor, k: int, knn_weight: float, metric: Metric = "l2"
) -> KNNDistribution:
    retriever = Retriever(LocalSource(FlatIndex(keys, metric), values), k)
    return KNNDistribution(base, retriever, FixedCombiner(k, knn_weight, 2.0))


def assert_top_is_dense(distribution: KNNDistribution, states: DecoderStates, n: int) -> None:
    dense = distribution(states)
    log_probs, tokens = distribution.top(states, n)
    assert log_probs.shape == tokens.shape == (len(states.hidden), n)
    torch.testing.assert_close(log_probs, dense.topk(n, dim=-1).values)
    torch.testing.assert_close(log_probs, dense.gather(1, tokens))
    assert (log_probs[:, :-1] >= log_probs[:, 1:]).all()
    assert all(len(set(row)) == n for row in tokens.tolist())


@pytest.mark.parametrize("n", [1, 5, VOCAB])
@pytest.mark.parametrize("k", [1, 3, 16])
@pytest.mark.parametrize("knn_weight", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_top_is_the_best_of_the_dense_form(
    base: Softmax, keys: Tensor, values: Tensor, n: int, k: int, knn_weight: float
) -> None:
    assert_top_is_dense(knn(base, keys, values, k, knn_weight), random_states(7), n)


def test_top_with_inner_products(base: Softmax, keys: Tensor, values: Tensor) -> None:
    assert_top_is_dense(knn(base, keys, values, 5, 0.5, "ip"), random_states(7), 4)


def test_top_with_missing_neighbours(base: Softmax, keys: Tensor, values: Tensor) -> None:
    retriever = Retriever(LocalSource(Patchy(FlatIndex(keys)), values), 5)
    distribution = KNNDistribution(base, retriever, FixedCombiner(5, 0.6, 2.0))
    states = random_states(6)
    assert_top_is_dense(distribution, states, 4)
    assert torch.equal(distribution(states)[0], base(states)[0])  # this row found none at all


def test_top_when_every_row_has_its_own_weight(base: Softmax, keys: Tensor, values: Tensor) -> None:
    distribution = KNNDistribution(
        base, Retriever(LocalSource(FlatIndex(keys), values), 5), RowByRow(5)
    )
    assert_top_is_dense(distribution, random_states(9), 4)


def test_top_among_equals(base: Softmax, keys: Tensor, values: Tensor) -> None:
    base.output_projection.weight.zero_()
    base.output_projection.bias.zero_()
    assert_top_is_dense(knn(base, keys, values, 5, 0.5), random_states(4), 9)


def test_weight_zero_is_the_model_exactly(base: Softmax, keys: Tensor, values: Tensor) -> None:
    base.output_projection.weight[:5] = base.output_projection.weight[5:10]  # ties
    base.output_projection.bias[:5] = base.output_projection.bias[5:10]
    states = random_states(11)
    distribution = knn(base, keys, values, 8, 0.0)
    assert torch.equal(distribution(states), base(states))
    best, tokens = base.top_with(states, 6, torch.zeros(11, 0, dtype=torch.long))
    assert torch.equal(distribution.top(states, 6)[0], best)
    assert torch.equal(distribution.top(states, 6)[1], tokens)


def test_weight_one_with_few_tokens_fills_up_with_nothing(
    base: Softmax, keys: Tensor, values: Tensor
) -> None:
    log_probs, _ = knn(base, keys, torch.full_like(values, 3), 4, 1.0).top(random_states(2), 3)
    torch.testing.assert_close(log_probs[:, 0], torch.zeros(2))
    assert (log_probs[:, 1:] == float("-inf")).all()


@pytest.mark.parametrize("knn_weight", [0.0, 0.3, 1.0])
def test_log_probs_sum_to_one(
    base: Softmax, keys: Tensor, values: Tensor, knn_weight: float
) -> None:
    log_probs = knn(base, keys, values, 4, knn_weight)(random_states(2, 3))
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 3))


def test_one_neighbour_with_all_the_weight_is_emitted(
    base: Softmax, keys: Tensor, values: Tensor
) -> None:
    states = random_states(9)
    distribution = knn(base, keys, values, 1, 1.0)
    nearest = torch.cdist(states.hidden, keys.float()).argmin(1)
    assert torch.equal(distribution(states).argmax(-1), values[nearest].long())
    assert torch.equal(distribution.top(states, 1)[1].squeeze(1), values[nearest].long())


def test_the_order_of_the_datastore_does_not_matter(
    base: Softmax, keys: Tensor, values: Tensor
) -> None:
    states, order = random_states(9), torch.randperm(ENTRIES)
    one, other = knn(base, keys, values, 6, 0.5), knn(base, keys[order], values[order], 6, 0.5)
    torch.testing.assert_close(one(states), other(states))
    assert torch.equal(one.top(states, 4)[1], other.top(states, 4)[1])


def test_mixture_says_what_went_in(base: Softmax, keys: Tensor, values: Tensor) -> None:
    states = random_states(2, 3)
    distribution = knn(base, keys, values, 4, 0.25)
    neighbours, mixture = distribution.mixture(states)
    assert torch.equal(neighbours.entries, distribution.retriever(states).entries)
    assert torch.equal(mixture.log_probs, distribution(states))
    assert mixture.knn_weight.shape == (2, 3, 1)
    torch.testing.assert_close(
        mixture.log_probs.exp(), 0.75 * base(states).exp() + 0.25 * mixture.knn_probs
    )


def test_bfloat16_autocast_does_not_reach_the_mixing(
    base: Softmax, keys: Tensor, values: Tensor
) -> None:
    states = random_states(5)
    distribution = knn(base, keys, values, 4, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense, (best, _) = distribution(states), distribution.top(states, 3)
    assert dense.dtype == best.dtype == torch.float32
    assert torch.equal(dense, distribution(states))
    assert torch.equal(best, distribution.top(states, 3)[0])


def test_it_is_no_module(base: Softmax, keys: Tensor, values: Tensor) -> None:
    assert not isinstance(knn(base, keys, values, 4, 0.5), nn.Module)


def test_retriever_and_combiner_agree_on_k(base: Softmax, keys: Tensor, values: Tensor) -> None:
    retriever = Retriever(LocalSource(FlatIndex(keys), values), 4)
    with pytest.raises(ValueError, match="finds 4 neighbours, but the combiner weighs 8"):
        KNNDistribution(base, retriever, FixedCombiner(8, 0.5, 10.0))


class TestNeverEmitted:
    """The model never emits some tokens; the datastore holds none of them."""

    NEVER = (0, 3, 7)

    @pytest.fixture
    def base(self) -> SoftmaxDistribution:
        projection = nn.Linear(DIM, VOCAB).requires_grad_(False)
        projection.bias[list(self.NEVER)] = 4.0  # yet likes them best
        return SoftmaxDistribution(projection, self.NEVER)

    @pytest.fixture
    def values(self) -> Tensor:
        allowed = torch.tensor([1, 2, 4, 5, 6])
        return allowed[torch.randint(0, 5, (ENTRIES,))]

    @pytest.mark.parametrize("n", [1, 4, 8, 16, VOCAB, 2 * VOCAB])
    @pytest.mark.parametrize("knn_weight", [0.0, 0.4, 1.0])
    @pytest.mark.parametrize("missing", [False, True])
    def test_top_is_the_best_of_the_dense_form_that_may_be_emitted(
        self,
        base: SoftmaxDistribution,
        keys: Tensor,
        values: Tensor,
        n: int,
        knn_weight: float,
        missing: bool,
    ) -> None:
        index = Patchy(FlatIndex(keys)) if missing else FlatIndex(keys)
        retriever = Retriever(LocalSource(index, values), 5)
        distribution = KNNDistribution(base, retriever, FixedCombiner(5, knn_weight, 2.0))
        states = random_states(7)
        dense = distribution(states).index_fill(1, torch.tensor(self.NEVER), float("-inf"))
        log_probs, tokens = distribution.top(states, n)
        n = min(n, VOCAB - len(self.NEVER))  # all there are
        assert log_probs.shape == tokens.shape == (7, n)
        torch.testing.assert_close(log_probs, dense.topk(n).values)
        torch.testing.assert_close(log_probs, dense.gather(1, tokens))
        assert all(len({*row} - {*self.NEVER}) == n for row in tokens.tolist())

    def test_a_combiner_sees_the_same_of_the_model_in_both_forms(
        self, base: SoftmaxDistribution, keys: Tensor, values: Tensor
    ) -> None:
        seen: list[ModelView] = []

        class Looking(RowByRow):
            num_best = 4

            def __call__(self, neighbours: Neighbours, view: ModelView | None = None) -> Weighting:
                assert view is not None
                seen.append(view)
                return super().__call__(neighbours, view)

        retriever = Retriever(LocalSource(FlatIndex(keys), values), 5)
        distribution = KNNDistribution(base, retriever, Looking(5))
        states = random_states(6)
        distribution.top(states, 3)
        distribution(states)
        distribution.evidence(states, torch.zeros(6, dtype=torch.long))
        expected = base.top(states, 4)[0]
        for view in seen:
            torch.testing.assert_close(view.best_log_probs, expected)
            torch.testing.assert_close(view.neighbour_log_probs, seen[0].neighbour_log_probs)


class Planned:
    """Finds what the test says: entries, -1 where none was found."""

    metric: Metric = "l2"
    description = "planned"
    num_bytes = 0

    def __init__(self, entries: list[list[int]]) -> None:
        self.entries = torch.tensor(entries)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        distances = torch.arange(float(k)).expand(self.entries.shape)
        return distances.masked_fill(self.entries < 0, float("inf")), self.entries


def test_a_missing_neighbour_is_no_token_0_and_a_found_one_is(base: Softmax) -> None:
    """Marian's end of sentence is token 0, the token that missing neighbours are given."""
    values = torch.tensor([0, 5, 5, 9])
    # Only missing ones beside token 5; token 0 beside missing ones; token 0 twice; nothing.
    found = [[1, 2, -1, -1], [3, 0, -1, -1], [0, 0, 1, -1], [-1, -1, -1, -1]]
    retriever = Retriever(LocalSource(Planned(found), values), 4)
    base.output_projection.weight.zero_()
    base.output_projection.bias.copy_(-torch.arange(VOCAB).float())  # 0 is the model's favourite,
    base.output_projection.bias[0] = -50.0  # or rather its last choice
    states = random_states(4)
    distribution = KNNDistribution(base, retriever, FixedCombiner(4, 0.9, 2.0))
    log_probs, tokens = distribution.top(states, 2)
    assert tokens.tolist() == [[5, 1], [9, 0], [0, 5], [1, 2]]
    torch.testing.assert_close(log_probs, distribution(states).gather(1, tokens))
    masses = torch.exp(-torch.arange(3.0) / 2)
    of_zero = 0.9 * torch.stack([masses[1] / masses[:2].sum(), masses[:2].sum() / masses.sum()])
    torch.testing.assert_close(log_probs[[1, 2], [1, 0]].exp(), of_zero)


class TestEvidence:
    @pytest.fixture
    def states(self) -> DecoderStates:
        return DecoderStates(torch.randn(6, DIM).half().float())

    @pytest.mark.parametrize("knn_weight", [0.0, 0.3, 0.9])
    @pytest.mark.parametrize("missing", [False, True])
    def test_it_is_what_the_equations_say(
        self,
        base: Softmax,
        keys: Tensor,
        values: Tensor,
        states: DecoderStates,
        knn_weight: float,
        missing: bool,
    ) -> None:
        index = Patchy(FlatIndex(keys)) if missing else FlatIndex(keys)
        retriever = Retriever(LocalSource(index, values), 5)
        distribution = KNNDistribution(base, retriever, FixedCombiner(5, knn_weight, 2.0))
        tokens = torch.tensor([0, 2, 5, 0, 15, 1])  # 15 is in no entry
        evidence = distribution.evidence(states, tokens)
        weight, bias = (p.double().numpy() for p in base.output_projection.parameters())
        for row, query in enumerate(states.hidden.double().numpy()):
            apart = np.square(keys.double().numpy() - query).sum(axis=1)
            entries = np.argsort(apart)[: row if missing else 5]  # `Patchy` keeps so many
            masses = np.exp(-(apart[entries] - apart.min()) / 2.0)
            shares = masses / masses.sum() * (values.numpy()[entries] == int(tokens[row]))
            logits = weight @ query + bias
            p_nmt = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            lambda_ = knn_weight if len(entries) else 0.0
            p = (1 - lambda_) * p_nmt[tokens[row]] + lambda_ * shares.sum()
            expected = {
                "nmt_probs": p_nmt[tokens[row]],
                "knn_weight": lambda_,
                "knn_probs": shares.sum(),
                "probs": p,
                "nmt_share": (1 - lambda_) * p_nmt[tokens[row]] / p,
                "shares": np.pad(lambda_ * shares / p, (0, 5 - len(entries))),
            }
            for name, value in expected.items():
                found = getattr(evidence, name)[row].numpy()
                np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-7, err_msg=name)
            assert evidence.neighbours.entries[row, : len(entries)].tolist() == entries.tolist()
        torch.testing.assert_close(evidence.shares.sum(1) + evidence.nmt_share, torch.ones(6))
        dense = distribution(states).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(evidence.probs, dense.exp())

    def test_an_impossible_token_has_no_evidence_rather_than_nan(
        self, base: Softmax, keys: Tensor, values: Tensor, states: DecoderStates
    ) -> None:
        evidence = knn(base, keys, values, 4, 1.0).evidence(states, torch.full((6,), 15))
        for name in ("knn_probs", "probs", "shares", "nmt_share"):
            assert not getattr(evidence, name).any(), name
