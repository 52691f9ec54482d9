"""faiss against our exact search."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lightning_knnmt.retrieval import FlatIndex, Metric
from lightning_knnmt.retrieval.errors import (
    DamagedIndexError,
    IndexFactoryError,
    MissingIndexError,
    StaleIndexError,
)
from lightning_knnmt.retrieval.faiss_index import FaissIndex
from lightning_knnmt.retrieval.recall import Truth, measure_recall

METRICS: list[Metric] = ["l2", "ip"]
ENTRIES, DIM = 4000, 32
Keys = npt.NDArray[np.float16]


def clustered(num_points: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, DIM, generator=torch.Generator().manual_seed(0)) * 3
    chosen = torch.randint(0, 40, (num_points,), generator=generator)
    return centres[chosen] + torch.randn(num_points, DIM, generator=generator)


@pytest.fixture(scope="module")
def keys() -> Keys:
    found: Keys = clustered(ENTRIES, 1).half().numpy()
    return found


@pytest.fixture(scope="module")
def queries() -> torch.Tensor:
    return clustered(100, 2).half().float()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 10])
def test_flat_is_flat(keys: Keys, queries: torch.Tensor, metric: Metric, k: int) -> None:
    ours, theirs = FlatIndex(keys, metric), FaissIndex.build(keys, "Flat", metric)
    torch.testing.assert_close(
        theirs.search(queries, k)[0], ours.search(queries, k)[0], atol=1e-3, rtol=1e-5
    )
    assert measure_recall(theirs, Truth.of(ours, queries, k)) == 1.0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("factory", ["IVF32,PQ16x4fs,Refine(SQfp16)", "IVF32,SQfp16"])
def test_approximate_search_finds_most(
    keys: Keys, queries: torch.Tensor, metric: Metric, factory: str
) -> None:
    ours = FlatIndex(keys, metric)
    truth = Truth.of(ours, queries, 8)
    index = FaissIndex.build(keys, factory, metric)
    reranks = "Refine" in factory
    index.set_parameters("nprobe=16,k_factor_rf=16" if reranks else "nprobe=16")
    assert measure_recall(index, truth) > 0.9
    distances, entries = index.search(queries, 8)
    assert (distances.diff() >= 0).all()
    # keys are float16, so re-ranking with float16 copies of them gives exact distances; lists of
    # float16 hold what is left after the centre, which float16 rounds
    tolerance = 1e-3 if reranks else 0.2
    exactly = ours.distances(queries, entries)
    torch.testing.assert_close(distances, exactly, atol=tolerance, rtol=1e-5)


def test_more_probes_find_more(keys: Keys, queries: torch.Tensor) -> None:
    truth = Truth.of(FlatIndex(keys), queries, 8)
    index = FaissIndex.build(keys, "IVF64,SQfp16", parameters="nprobe=1")
    few = measure_recall(index, truth)
    index.set_parameters("nprobe=64")
    assert few < measure_recall(index, truth) == 1.0


def test_each_metric_has_its_own_index(queries: torch.Tensor) -> None:
    """A long key is the best by product and the worst by distance."""
    keys = clustered(ENTRIES, 1)
    keys[7] = queries[0] * 50
    by_product = FaissIndex.build(keys.numpy(), "IVF16,Flat", "ip", parameters="nprobe=16")
    assert by_product.search(queries[:1], 1)[1].item() == 7
    by_distance = FaissIndex.build(keys.numpy(), "IVF16,Flat", "l2", parameters="nprobe=16")
    assert 7 not in by_distance.search(queries[:1], 100)[1]


def test_missing_neighbours_are_marked(keys: Keys, queries: torch.Tensor) -> None:
    index = FaissIndex.build(keys, "IVF64,Flat", parameters="nprobe=1")
    distances, entries = index.search(queries, 1000)
    missing = entries < 0
    assert missing.any()
    assert distances[missing].isinf().all()
    assert (distances[missing] > 0).all()
    assert distances[~missing].isfinite().all()
    by_product = FaissIndex.build(keys, "IVF64,Flat", "ip", parameters="nprobe=1")
    distances, entries = by_product.search(queries, 1000)
    assert (distances[entries < 0] == float("inf")).all()


@pytest.mark.parametrize("metric", METRICS)
def test_building_twice_gives_the_same(keys: Keys, queries: torch.Tensor, metric: Metric) -> None:
    one, other = (
        FaissIndex.build(
            keys, "IVF32,PQ16x4fs,Refine(SQfp16)", metric, parameters="nprobe=4,k_factor_rf=2"
        ).search(queries, 8)
        for _ in range(2)
    )
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_k_larger_than_the_datastore(keys: Keys, queries: torch.Tensor) -> None:
    index = FaissIndex.build(keys[:20], "Flat")
    with pytest.raises(ValueError, match="k is 21, larger than the datastore, which has 20"):
        index.search(queries, 21)


def test_unknown_metric(keys: Keys) -> None:
    with pytest.raises(ValueError, match="metric is 'dot'"):
        FaissIndex.build(keys, "Flat", "dot")  # type: ignore[arg-type]


class TestSaving:
    @pytest.fixture
    def saved(self, keys: Keys, tmp_path: Path) -> Path:
        index = FaissIndex.build(keys, "IVF32,SQfp16", parameters="nprobe=5")
        index.save(tmp_path / "indexes" / "ivf", keys_digest="abc")
        return tmp_path / "indexes" / "ivf"

    def test_it_comes_back(self, saved: Path, keys: Keys, queries: torch.Tensor) -> None:
        index = FaissIndex.load(saved, keys_digest="abc")
        built = FaissIndex.build(keys, "IVF32,SQfp16", parameters="nprobe=5")
        assert index.description == "IVF32,SQfp16 (l2, nprobe=5)"
        assert index.num_bytes == (saved / "index.faiss").stat().st_size
        for one, other in zip(index.search(queries, 4), built.search(queries, 4), strict=True):
            assert torch.equal(one, other)

    def test_it_replaces_an_older_one(self, saved: Path, keys: Keys) -> None:
        FaissIndex.build(keys, "Flat").save(saved, keys_digest="abc")
        assert FaissIndex.load(saved, keys_digest="abc").factory == "Flat"
        assert [path.name for path in saved.parent.iterdir()] == ["ivf"]

    def test_of_other_keys(self, saved: Path) -> None:
        with pytest.raises(StaleIndexError, match="built over the keys abc…, but the datastore's"):
            FaissIndex.load(saved, keys_digest="xyz")

    def test_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(MissingIndexError, match=r"no finished index in .*ivf"):
            FaissIndex.load(tmp_path / "ivf", keys_digest="abc")

    def test_damaged(self, saved: Path) -> None:
        content = bytearray((saved / "index.faiss").read_bytes())
        content[1000] ^= 1
        (saved / "index.faiss").write_bytes(content)
        with pytest.raises(DamagedIndexError, match=r"index.faiss is missing or damaged"):
            FaissIndex.load(saved, keys_digest="abc")

    def test_damaged_manifest(self, saved: Path) -> None:
        (saved / "manifest.json").write_text(json.dumps({"factory": "Flat"}))
        with pytest.raises(DamagedIndexError, match="is not an index's manifest"):
            FaissIndex.load(saved, keys_digest="abc")


@pytest.mark.parametrize(
    ("factory", "parameters", "message"),
    [
        ("IVF4,PQ128x4fs", "", r"no index 'IVF4,PQ128x4fs' over keys of 24 .*multiple.*PQ12x4fs,"),
        ("IFV4,Flat", "", r"no index 'IFV4,Flat' over keys of 24 dimensions \(.*IFV4"),
        ("IVF4,Flat", "nprobes=3", r"IVF4,Flat cannot be searched with 'nprobes=3' \(.*nprobes"),
    ],
)
def test_a_description_that_faiss_cannot_follow_is_told_in_a_sentence(
    factory: str, parameters: str, message: str
) -> None:
    keys = np.random.default_rng(1).standard_normal((200, 24)).astype(np.float16)
    with pytest.raises(IndexFactoryError, match=message) as raised:
        FaissIndex.build(keys, factory, parameters=parameters)
    assert "\n" not in str(raised.value)
