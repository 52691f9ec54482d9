"""Exact search against the definition."""

import numpy as np
import pytest
import torch

from lightning_knnmt.retrieval import FlatIndex
from lightning_knnmt.retrieval import index as index_module
from lightning_knnmt.retrieval.index import as_tensor, top_of_columns


def definition(queries: torch.Tensor, keys: torch.Tensor, metric: str) -> torch.Tensor:
    queries, keys = queries.double(), keys.double()
    return torch.cdist(queries, keys).square() if metric == "l2" else -queries @ keys.T


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("k", [1, 7, 300])
@pytest.mark.parametrize("tile_scores", [1, 2**10, 2**20])
def test_it_finds_the_nearest(
    metric: str, k: int, tile_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "CPU_TILE_SCORES", tile_scores)
    keys, queries = torch.randn(5000, 12).half(), torch.randn(9, 12)
    distances, entries = FlatIndex(keys, metric).search(queries, k)
    wanted, _ = definition(queries, keys, metric).topk(k, largest=False)
    torch.testing.assert_close(distances, wanted.float(), atol=1e-5, rtol=1e-5)
    at_entries = definition(queries, keys, metric).gather(1, entries).float()
    torch.testing.assert_close(distances, at_entries, atol=1e-5, rtol=1e-5)
    assert all(len(set(row)) == k for row in entries.tolist())


def test_close_keys_far_from_the_origin_are_told_apart() -> None:
    """|q|² - 2 q·k + |k|² in float32 would lose these differences."""
    keys = torch.full((50, 4), 1000.0).half()
    keys[:, 0] = 1000 + torch.arange(50) / 2
    queries = keys[:1].float()
    distances, entries = FlatIndex(keys).search(queries, 3)
    assert distances[0].tolist() == [0.0, 0.25, 1.0]
    assert entries[0].tolist() == [0, 1, 2]


def test_half_the_memory_finds_the_same() -> None:
    keys, queries = torch.randn(3000, 8).half(), torch.randn(5, 8)
    full, half = FlatIndex(keys), FlatIndex(keys, storage_dtype=torch.float16)
    assert half.num_bytes < 0.6 * full.num_bytes
    for one, other in zip(full.search(queries, 4), half.search(queries, 4), strict=True):
        assert torch.equal(one, other)


def test_bfloat16_autocast_does_not_reach_it() -> None:
    keys, queries = torch.randn(500, 16), torch.randn(5, 16)
    index = FlatIndex(keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = index.search(queries, 5)
    assert torch.equal(under_autocast[0], index.search(queries, 5)[0])


def test_no_query() -> None:
    distances, entries = FlatIndex(torch.randn(5, 3)).search(torch.randn(0, 3), 2)
    assert distances.shape == entries.shape == (0, 2)


def test_read_only_keys_are_taken_as_they_are() -> None:
    keys = np.ones((3, 2), dtype=np.float16)
    keys.flags.writeable = False
    assert as_tensor(keys).data_ptr() == keys.__array_interface__["data"][0]
    assert FlatIndex(keys).search(torch.ones(1, 2), 1)[0].item() == 0


@pytest.mark.parametrize("length", [1, 63, 64, 1000, 4096])
def test_top_of_columns_is_topk(length: int) -> None:
    scores = torch.randn(length, 6)
    k = min(length, 5)
    best = top_of_columns(scores, k)
    assert torch.equal(best.scores, scores.topk(k, dim=0).values)
    assert torch.equal(scores.gather(0, best.rows), best.scores)


def test_k_larger_than_the_datastore() -> None:
    with pytest.raises(ValueError, match="k is 6, larger than the datastore, which has 5 entries"):
        FlatIndex(torch.randn(5, 3)).search(torch.randn(1, 3), 6)


def test_k_of_zero() -> None:
    with pytest.raises(ValueError, match="k is 0, but it must be at least 1"):
        FlatIndex(torch.randn(5, 3)).search(torch.randn(1, 3), 0)


def test_unknown_metric() -> None:
    with pytest.raises(ValueError, match="metric is 'cosine', but it must be one of l2, ip"):
        FlatIndex(torch.randn(5, 3), "cosine")  # type: ignore[arg-type]
