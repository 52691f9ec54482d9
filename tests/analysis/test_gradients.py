"""The meta-gradient and the explicit one, against autograd on whole matrices in float64."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn

from lightning_knnmt.analysis import gradients, retrieved
from lightning_knnmt.analysis.gradients import (
    GradientProducts,
    compare_gradients,
    step_products,
    token_products,
)
from lightning_knnmt.analysis.retrieved import AnalysisError
from lightning_knnmt.retrieval import Metric, Record

M, K, D, V, ENTRIES = 7, 4, 5, 11, 30
STEPS = torch.tensor([3, 0, 3, 3, 9, 0, 9])
TEMPERATURE = 2.5


def random_record() -> Record:
    """Seven tokens; the third misses two neighbours and the last one found none."""
    entries = torch.stack([torch.randperm(ENTRIES)[:K] for _ in range(M)])
    entries[2, 2:] = -1
    entries[6] = -1
    missing = entries < 0
    return Record(
        tokens=torch.randint(1, 5, (M, K)).masked_fill(missing, 0).int(),  # with repetitions
        distances=torch.rand(M, K).sort().values.masked_fill(missing, torch.inf),
        entries=entries,
        gold=torch.tensor([0, 1, 2, 3, 4, 5, 1]).int(),
        gold_log_probs=torch.zeros(M),
        neighbour_log_probs=torch.zeros(M, K),
        sentences=torch.zeros(M).int(),
        queries=torch.randn(M, D),
    )


@pytest.fixture
def record() -> Record:
    return random_record()


@pytest.fixture
def keys() -> Tensor:
    return torch.randn(ENTRIES, D).half()


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def projection(request: pytest.FixtureRequest) -> nn.Linear:
    return nn.Linear(D, V, bias=request.param, dtype=torch.float64)


def pairs_of(record: Record, keys: Tensor, token: int, k: int) -> tuple[Tensor, Tensor]:
    """K_m, [D, found], and the one-hot V_m, [V, found], as the paper writes them."""
    found = [i for i in range(k) if record.entries[token, i] >= 0]
    columns = [keys[record.entries[token, i]].double() for i in found]
    one_hot = torch.zeros(V, len(found), dtype=torch.float64)
    for column, i in enumerate(found):
        one_hot[record.tokens[token, i], column] = 1.0
    return torch.stack(columns, dim=1), one_hot


def by_autograd(
    projection: nn.Linear, pairs: tuple[Tensor, Tensor], metric: Metric
) -> tuple[Tensor, Tensor]:
    """ΔW_kNN and ΔW_OPL, [V, D], as gradients of what the two kinds of tuning maximise."""
    columns, one_hot = pairs
    weight = projection.weight.detach().clone().requires_grad_()
    similarity = torch.trace(one_hot.T @ weight @ columns) * (2.0 if metric == "l2" else 1.0)
    relaxed = similarity - TEMPERATURE / 2 * weight.square().sum()
    (knn,) = torch.autograd.grad(relaxed, weight)
    logits = weight @ columns
    if projection.bias is not None:
        logits = logits + projection.bias.detach()[:, None]
    loss = nn.functional.cross_entropy(logits.T, one_hot.argmax(dim=0), reduction="sum")
    (opl,) = torch.autograd.grad(-loss, weight)
    return knn, opl


def cosines(knn: Tensor, opl: Tensor, attraction: Tensor, weight: Tensor) -> list[float]:
    def cosine(one: Tensor) -> float:
        norms = one.norm() * opl.norm()
        return float((one * opl).sum() / norms) if norms > 0 else 0.0

    ratios = [float(one.norm() / opl.norm()) for one in (knn, attraction)]
    return [cosine(knn), cosine(attraction), cosine(-weight), *ratios]


def one_by_one(products: GradientProducts, metric: Metric) -> list[list[float]]:
    """Every gradient's five numbers, from summaries of one."""
    found = []
    for g in range(len(products.aa)):
        single = GradientProducts(*(part[g : g + 1] for part in products))
        result = compare_gradients(single, metric, TEMPERATURE)
        summaries = (
            result.cosine,
            result.cosine_without_decay,
            result.cosine_of_decay,
            result.norm_ratio,
            result.norm_ratio_without_decay,
        )
        found.append([s.mean for s in summaries if s is not None])
    return found


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_a_tokens_gradients(
    record: Record,
    keys: Tensor,
    projection: nn.Linear,
    metric: Metric,
    k: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retrieved, "LOGITS_AT_ONCE", 2 * k * V)  # two tokens at a time
    weight = projection.weight.detach()
    expected = []
    for token in range(6):
        pairs = pairs_of(record, keys, token, k)
        knn, opl = by_autograd(projection, pairs, metric)
        attraction = knn + TEMPERATURE * weight
        expected.append(cosines(knn, opl, attraction, weight))
    products = token_products(record, keys, projection, k)
    torch.testing.assert_close(one_by_one(products, metric), expected)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("at_once", [3, 40, 10000])
def test_a_steps_gradient_is_the_sum_of_its_tokens(
    record: Record,
    keys: Tensor,
    projection: nn.Linear,
    metric: Metric,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradients, "LOGITS_AT_ONCE", at_once)
    weight = projection.weight.detach()
    expected = []
    for members in ([1, 5], [0, 2, 3], [4]):  # steps 0, 3 and 9; token 6 found nothing
        pairs = [pairs_of(record, keys, token, K) for token in members]
        both = [by_autograd(projection, pair, metric) for pair in pairs]
        knn, opl = (sum(parts, torch.zeros(V, D)) for parts in zip(*both, strict=True))
        attraction = knn + TEMPERATURE * len(members) * weight
        expected.append(cosines(knn, opl, attraction, weight))
    products = step_products(record, keys, projection, K, STEPS)
    assert products.num_tokens.tolist() == [2, 3, 1]
    torch.testing.assert_close(one_by_one(products, metric), expected)


def test_intervals_of_cosines_resample_the_texts(
    record: Record, keys: Tensor, projection: nn.Linear
) -> None:
    products = token_products(record, keys, projection, K)  # of tokens 0 to 5
    each = [numbers[1] for numbers in one_by_one(products, "l2")]  # without decay
    with_both = [numbers[0] for numbers in one_by_one(products, "l2")]
    assert compare_gradients(products, "l2", TEMPERATURE).cosine_interval is None
    one_text = compare_gradients(products, "l2", TEMPERATURE, torch.zeros(6))
    mean = sum(with_both) / 6
    assert one_text.cosine_interval == pytest.approx((mean, mean))
    texts = torch.tensor([0, 0, 0, 1, 1, 1])
    two_texts = compare_gradients(products, "l2", TEMPERATURE, texts)
    means = sorted([sum(each[:3]) / 3, sum(each[3:]) / 3])  # one of them drawn twice, 1 in 4
    assert two_texts.cosine_without_decay_interval == pytest.approx(tuple(means))


def test_l2_at_twice_the_temperature_has_the_inner_products_cosine(
    record: Record, keys: Tensor, projection: nn.Linear
) -> None:
    products = token_products(record, keys, projection, K)
    l2, ip = compare_gradients(products, "l2", 6.0), compare_gradients(products, "ip", 3.0)
    assert l2.cosine is not None
    assert ip.cosine is not None
    assert l2.norm_ratio is not None
    assert ip.norm_ratio is not None
    assert l2.cosine.mean == pytest.approx(ip.cosine.mean)
    assert l2.norm_ratio.mean == pytest.approx(2 * ip.norm_ratio.mean)
    assert l2.cosine_without_decay == ip.cosine_without_decay


def test_float32_is_close(record: Record, keys: Tensor) -> None:
    projection = nn.Linear(D, V)
    single = token_products(record, keys, projection, K)
    double = token_products(record, keys, projection.double(), K)
    torch.testing.assert_close(
        [part.double() for part in single], [part.double() for part in double], rtol=1e-4, atol=1e-4
    )


def test_float32_is_close_where_the_model_is_sure(record: Record, keys: Tensor) -> None:
    projection = nn.Linear(D, V)
    projection.bias.data[3] = 18.0  # 1 - p is about 1e-7 for a neighbour with token 3
    sure = dataclasses.replace(record, tokens=torch.full((M, K), 3).int())

    def products() -> tuple[GradientProducts, GradientProducts]:
        of_tokens = token_products(sure, keys, projection, K)
        return of_tokens, step_products(sure, keys, projection, K, STEPS)

    single = products()
    projection.double()
    for float32, float64 in zip(single, products(), strict=True):
        assert float64.rr.max() < 1e-9
        for name in ("ar", "rr", "rw"):
            torch.testing.assert_close(
                getattr(float32, name).double(), getattr(float64, name), rtol=1e-4, atol=0.0
            )


def test_a_summary_goes_into_json(record: Record, keys: Tensor, projection: nn.Linear) -> None:
    products = token_products(record, keys, projection, K)
    result = dataclasses.asdict(compare_gradients(products, "l2", 10.0))
    assert json.loads(json.dumps(result))["cosine"]["count"] == 6


def test_without_any_neighbour_there_is_nothing_to_compare(
    record: Record, keys: Tensor, projection: nn.Linear
) -> None:
    empty = dataclasses.replace(record, entries=torch.full((M, K), -1))
    for products in (
        token_products(empty, keys, projection, K),
        step_products(empty, keys, projection, K, STEPS),
    ):
        result = compare_gradients(products, "l2", 10.0)
        assert (result.cosine, result.norm_ratio) == (None, None)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_that_is_none(
    record: Record, keys: Tensor, projection: nn.Linear, temperature: float
) -> None:
    products = token_products(record, keys, projection, K)
    with pytest.raises(AnalysisError, match="temperature"):
        compare_gradients(products, "l2", temperature)


def test_parts_that_do_not_fit(record: Record, keys: Tensor, projection: nn.Linear) -> None:
    without = dataclasses.replace(record, queries=None)
    with pytest.raises(AnalysisError, match="keep_queries=True"):
        token_products(without, keys, projection, K)
    with pytest.raises(AnalysisError, match=r"5 .*1 to 4"):
        token_products(record, keys, projection, 5)
    with pytest.raises(AnalysisError, match=r"queries .*5 .*keys 4"):
        step_products(record, keys[:, :4], projection, K, STEPS)
    with pytest.raises(AnalysisError, match=r"entry \d+.* 5 "):
        token_products(record, keys[:5], projection, K)
