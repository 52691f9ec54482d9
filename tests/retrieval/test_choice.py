"""A choice of index is made once for a datastore, and found again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_knnmt.retrieval import AutoChoice, Datastore, FaissChoice, FlatChoice, FlatIndex
from lightning_knnmt.retrieval.faiss_index import FaissIndex
from lightning_knnmt.retrieval.writer import DatastoreWriter

M, D = 12_000, 16


@pytest.fixture(scope="module")
def states() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(100, D, generator=generator) * 3
    chosen = torch.randint(0, 100, (M + 150,), generator=generator)
    return centres[chosen] + torch.randn(M + 150, D, generator=generator)


@pytest.fixture
def datastore(states: Tensor, tmp_path: Path) -> Datastore:
    writer = DatastoreWriter.create(tmp_path / "store", M, D)
    writer.write(np.arange(M), states[:M].numpy(), np.zeros(M, dtype=np.int64))
    return writer.commit(
        M, model_fingerprint="f", tokenizer_digest="t", corpus_name="toy", corpus_digest="c"
    )


def refuse() -> Tensor:
    raise AssertionError("what was measured once needs no queries again")


def test_flat_is_exact_and_measures_nothing(datastore: Datastore) -> None:
    found = FlatChoice().ensure(datastore, "l2", 4, refuse)
    assert isinstance(found.index, FlatIndex)
    assert (found.k, found.recall_at_k) == (4, 1.0)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_a_described_index_is_built_once_and_measured(
    datastore: Datastore, states: Tensor, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = FaissChoice("IVF32,Flat", "nprobe=32")
    first = choice.ensure(datastore, metric, 4, lambda: states[M:])  # type: ignore[arg-type]
    assert first.recall_at_k == pytest.approx(1.0, abs=1e-3)  # every list is probed
    poor = FaissChoice("IVF32,Flat", "nprobe=1")
    monkeypatch.setattr(FaissIndex, "build", None)  # building again would be an error
    second = poor.ensure(datastore, metric, 4, lambda: states[M:])  # type: ignore[arg-type]
    assert second.recall_at_k < first.recall_at_k


def test_auto_remembers_its_choice_and_serves_every_k_with_one_index(
    datastore: Datastore, states: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = AutoChoice(recall=0.8)
    first = choice.ensure(datastore, "l2", 8, lambda: states[M:])
    assert first.recall_at_k >= 0.8
    again = choice.ensure(datastore, "l2", 8, refuse)
    assert again.recall_at_k == first.recall_at_k
    queries = states[M:].half().float()
    assert torch.equal(again.index.search(queries, 8)[1], first.index.search(queries, 8)[1])
    if isinstance(first.index, FaissIndex):
        monkeypatch.setattr(FaissIndex, "build", None)
        other = choice.ensure(datastore, "l2", 2, lambda: states[M:])
        assert other.k == 2
        assert other.recall_at_k >= 0.8


def test_a_damaged_report_is_measured_anew(datastore: Datastore, states: Tensor) -> None:
    choice = AutoChoice(recall=0.8)
    choice.ensure(datastore, "l2", 8, lambda: states[M:])
    (report,) = (datastore.directory / "indexes").glob("auto-*.json")
    for damage in ("", "{", "[]", "{}"):
        report.write_text(damage)
        assert choice.ensure(datastore, "l2", 8, lambda: states[M:]).recall_at_k >= 0.8
        assert choice.ensure(datastore, "l2", 8, refuse).recall_at_k >= 0.8
