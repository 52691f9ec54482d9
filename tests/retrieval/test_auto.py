"""The index is chosen by measuring."""

import pytest
import torch

from lightning_knnmt.retrieval import FlatIndex, choose_index
from lightning_knnmt.retrieval import auto as auto_module
from lightning_knnmt.retrieval.auto import (
    IndexReport,
    factories,
    num_lists,
    num_queries,
    spread_sample,
)
from lightning_knnmt.retrieval.faiss_index import FaissIndex

ENTRIES, DIM = 20_000, 64


@pytest.fixture(scope="module")
def keys() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(200, DIM, generator=generator) * 2
    chosen = torch.randint(0, 200, (ENTRIES + 200,), generator=generator)
    return centres[chosen] + torch.randn(ENTRIES + 200, DIM, generator=generator)


def test_it_reaches_the_recall_and_says_everything(keys: torch.Tensor) -> None:
    index, report = choose_index(keys[200:].half().numpy(), keys[:200], 8, recall=0.9)
    assert report.choice.recall >= 0.9
    assert index.description == report.choice.description
    fast_enough = [each for each in report.candidates if each.recall >= 0.9]
    assert report.choice.milliseconds_per_query == min(
        each.milliseconds_per_query for each in fast_enough
    )
    assert report.candidates[0].description == "exact (l2, cpu)"
    assert len(report.candidates) > 2
    assert (report.num_entries, report.key_dim, report.num_queries) == (ENTRIES, DIM, 200)


def test_the_report_survives_json_and_is_readable(keys: torch.Tensor) -> None:
    _, report = choose_index(keys[200:1200].half().numpy(), keys[:50], 4)
    assert IndexReport.from_json(report.to_json()) == report
    assert "-> " in str(report)
    assert "1,000 entries of 64 dimensions" in str(report)


def test_a_small_datastore_is_searched_exactly_without_trying(keys: torch.Tensor) -> None:
    index, report = choose_index(keys[200:1200].half().numpy(), keys[:50], 4)
    assert isinstance(index, FlatIndex)
    assert len(report.candidates) == 1


def test_exact_when_nothing_else_is_good_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_module, "EXACT_BELOW", 1)
    monkeypatch.setattr(auto_module, "NUM_PROBES", (1,))
    noise = torch.randn(2100, DIM)
    index, report = choose_index(noise[100:].half().numpy(), noise[:100], 16, recall=0.999)
    assert isinstance(index, FlatIndex)
    assert report.chosen == 0
    assert len(report.candidates) > 1


def test_an_index_that_is_there_is_tried_instead_of_building(keys: torch.Tensor) -> None:
    stored = keys[200:].half().numpy()
    built = FaissIndex.build(stored, "IVF64,SQfp16")
    _, report = choose_index(stored, keys[:200], 4, recall=0.9, built=[built])
    assert {each.factory for each in report.candidates} == {"", "IVF64,SQfp16"}


def test_inner_product(keys: torch.Tensor) -> None:
    index, report = choose_index(keys[200:].half().numpy(), keys[:200], 8, recall=0.9, metric="ip")
    assert index.metric == report.metric == "ip"
    assert report.choice.recall >= 0.9


def test_k_larger_than_the_datastore() -> None:
    with pytest.raises(ValueError, match="k is 11, larger than the datastore, which has 10"):
        choose_index(torch.randn(10, 4).numpy(), torch.randn(5, 4), 11)


@pytest.mark.parametrize("wrong", [0.0, 1.5, -1.0])
def test_recall_that_cannot_be(wrong: float) -> None:
    with pytest.raises(ValueError, match=f"recall is {wrong}, but it must lie above 0"):
        choose_index(torch.randn(10, 4).numpy(), torch.randn(5, 4), 2, recall=wrong)


def test_sizes_follow_the_data() -> None:
    assert [num_lists(n) for n in (100, 208_000, 630_000, 19_000_000)] == [16, 1024, 2048, 8192]
    assert [num_queries(n, 256) for n in (208_000, 10**8)] == [1024, 128]
    assert factories(208_000, 256)[0] == "IVF1024,PQ128x4fs,Refine(SQfp16)"
    assert torch.equal(spread_sample(torch.arange(10), 3), torch.tensor([0, 4, 9]))
    assert torch.equal(spread_sample(torch.arange(10), 30), torch.arange(10))
