"""Weights of neighbours and the mixture."""

import numpy as np
import pytest
import torch

from lightning_knnmt.retrieval import FixedCombiner, FlatIndex, Neighbours
from lightning_knnmt.retrieval.combiner import (
    DistanceCombiner,
    interpolate,
    neighbour_probs,
    spread,
)
from lightning_knnmt.retrieval.errors import CombinerError

INF = float("inf")


def found(distances: list[list[float]]) -> Neighbours:
    tensor = torch.tensor(distances)
    return Neighbours(torch.zeros_like(tensor, dtype=torch.long), tensor, tensor.isfinite().long())


class TestNeighbourProbs:
    def test_softmax(self) -> None:
        distances = torch.rand(5, 4).sort().values * 100
        torch.testing.assert_close(neighbour_probs(distances, 10.0), (-distances / 10).softmax(-1))

    def test_negative_distances_of_inner_products(self) -> None:
        distances = torch.tensor([[-5000.0, -4990.0]])
        torch.testing.assert_close(neighbour_probs(distances, 10.0), (-distances / 10).softmax(-1))

    def test_far_away_is_still_a_distribution(self) -> None:
        probs = neighbour_probs(torch.tensor([[1e30, 2e30, INF]]), 1e-3)
        assert probs.tolist() == [[1.0, 0.0, 0.0]]

    def test_missing_neighbours_have_no_weight(self) -> None:
        probs = neighbour_probs(torch.tensor([[1.0, 1.0, INF], [INF, INF, INF]]), 10.0)
        assert probs.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]


def test_spread_adds_up_by_token() -> None:
    probs = torch.tensor([[0.5, 0.25, 0.25]])
    spreaded = spread(probs, torch.tensor([[3, 1, 3]]), 5)
    assert spreaded.tolist() == [[0, 0.25, 0, 0.75, 0]]


class TestInterpolate:
    NMT = torch.randn(6, 50).log_softmax(-1)
    KNN = torch.eye(50)[:6] * 0.75 + torch.eye(50)[3:9] * 0.25

    def test_the_mixture(self) -> None:
        mixed = interpolate(self.NMT, self.KNN, torch.full((6, 1), 0.3))
        torch.testing.assert_close(mixed.exp(), 0.7 * self.NMT.exp() + 0.3 * self.KNN)

    def test_weight_zero_is_the_model_bit_for_bit(self) -> None:
        assert torch.equal(interpolate(self.NMT, self.KNN, torch.zeros(6, 1)), self.NMT)

    def test_weight_one_is_the_datastore(self) -> None:
        mixed = interpolate(self.NMT, self.KNN, torch.ones(6, 1))
        torch.testing.assert_close(mixed.exp(), self.KNN)

    def test_each_row_has_its_own_weight(self) -> None:
        weight = torch.linspace(0, 1, 6).unsqueeze(1)
        mixed = interpolate(self.NMT, self.KNN, weight)
        wanted = (1 - weight) * self.NMT.exp() + weight * self.KNN
        torch.testing.assert_close(mixed.exp(), wanted)
        assert torch.equal(mixed[0], self.NMT[0])

    def test_its_gradient_is_finite(self) -> None:
        weight = torch.full((6, 1), 0.3, requires_grad=True)
        knn = self.KNN.clone().requires_grad_()
        interpolate(self.NMT, knn, weight).mean().backward()
        assert weight.grad is not None
        assert knn.grad is not None
        assert weight.grad.isfinite().all()
        assert knn.grad.isfinite().all()
        # d/dλ log p = (p_kNN - p_NMT) / p
        mixed = 0.7 * self.NMT.exp() + 0.3 * self.KNN
        wanted = ((self.KNN - self.NMT.exp()) / mixed).sum(-1, keepdim=True) / 300
        torch.testing.assert_close(weight.grad, wanted)


class TestFixedCombiner:
    def test_it_weighs(self) -> None:
        weighting = FixedCombiner(2, 0.7, 10.0)(found([[1.0, 2.0], [0.0, INF]]))
        torch.testing.assert_close(
            weighting.neighbour_probs[0], torch.tensor([-0.1, -0.2]).softmax(-1)
        )
        assert weighting.neighbour_probs[1].tolist() == [1.0, 0.0]
        torch.testing.assert_close(weighting.knn_weight, torch.tensor([[0.7], [0.7]]))

    def test_without_neighbours_the_model_speaks_alone(self) -> None:
        weighting = FixedCombiner(2, 0.7, 10.0)(found([[INF, INF]]))
        assert weighting.knn_weight.tolist() == [[0.0]]
        assert weighting.neighbour_probs.tolist() == [[0.0, 0.0]]

    def test_equal_values_make_equal_combiners(self) -> None:
        assert FixedCombiner(4, 0.5, 10.0) == FixedCombiner(
            temperature=10.0, knn_weight=0.5, num_neighbours=4
        )
        assert FixedCombiner(4, 0.5, 10.0) != FixedCombiner(4, 0.5, 11.0)

    def test_it_shows_its_numbers(self) -> None:
        assert "knn_weight=0.5, temperature=10.0" in repr(FixedCombiner(4, 0.5, 10.0))

    @pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
    def test_weight_outside(self, wrong: float) -> None:
        with pytest.raises(ValueError, match=f"λ is {wrong}"):
            FixedCombiner(4, wrong, 10.0)

    @pytest.mark.parametrize("wrong", [0.0, -5.0, float("nan"), INF])
    def test_temperature_not_positive(self, wrong: float) -> None:
        with pytest.raises(ValueError, match=f"T is {wrong}"):
            FixedCombiner(4, 0.5, wrong)

    def test_no_neighbours_asked_for(self) -> None:
        with pytest.raises(ValueError, match="k is 0"):
            FixedCombiner(0, 0.5, 10.0)


class TestDistanceCombiner:
    DISTANCES = torch.rand(64, 4, generator=torch.Generator().manual_seed(3)).sort().values * 200

    def test_it_is_the_rule_in_float64(self) -> None:
        combiner = DistanceCombiner(4, temperature=30.0, peak=0.8, reach=60.0)
        weighting = combiner(found(self.DISTANCES.tolist()))
        distances = self.DISTANCES.double().numpy()
        weights = 0.8 * np.maximum(0.0, 1.0 - distances[:, :1] / 60.0)
        assert 0 < (weights == 0).sum() < len(weights)
        masses = np.exp(-distances / 30.0)
        probs = masses / masses.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(weighting.knn_weight.numpy(), weights, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(weighting.neighbour_probs.numpy(), probs, rtol=1e-5)

    def test_without_neighbours_the_model_speaks_alone(self) -> None:
        weighting = DistanceCombiner(2, 10.0, 1.0, 50.0)(found([[INF, INF], [25.0, INF]]))
        assert weighting.knn_weight.tolist() == [[0.0], [0.5]]
        assert weighting.neighbour_probs.tolist() == [[0.0, 0.0], [1.0, 0.0]]

    def test_an_equal_key_has_the_peak_even_if_rounding_makes_it_nearer_still(self) -> None:
        weighting = DistanceCombiner(1, 10.0, 0.9, 50.0)(found([[0.0], [-1e-3]]))
        torch.testing.assert_close(weighting.knn_weight, torch.full((2, 1), 0.9))

    def test_nearer_means_more_in_a_search(self) -> None:
        keys = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)).half()
        steps = torch.linspace(0, 12, 7).unsqueeze(1)
        distances, entries = FlatIndex(keys).search(keys[:1].float() + steps, 3)
        weighting = DistanceCombiner(3, 5.0, 0.7, 40.0)(Neighbours(entries, distances, entries))
        weights = weighting.knn_weight[:, 0].tolist()
        assert weights[0] == pytest.approx(0.7)
        assert weights[-1] == 0.0  # far from everything
        assert weights == sorted(weights, reverse=True)

    def test_only_squared_distances_have_a_zero(self) -> None:
        DistanceCombiner.check_metric("l2")
        with pytest.raises(CombinerError, match=r"\bip\b.*knn\.metric=l2.*knn=fixed"):
            DistanceCombiner.check_metric("ip")

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ((0, 10.0, 0.5, 50.0), "k is 0"),
            ((4, 0.0, 0.5, 50.0), r"T is 0\.0"),
            ((4, 10.0, 1.1, 50.0), r"λ is 1\.1"),
            ((4, 10.0, -0.1, 50.0), r"λ is -0\.1"),
            ((4, 10.0, 0.5, 0.0), r"reach is 0\.0"),
            ((4, 10.0, 0.5, INF), "reach is inf"),
            ((4, 10.0, 0.5, float("nan")), "reach is nan"),
            ((4, 10.0, 0.5, "far"), "reach is far"),
        ],
    )
    def test_values_that_cannot_be(
        self, values: tuple[int, float, float, float], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            DistanceCombiner(*values)
