"""Whose inputs a datastore's keys are: what it says, what it refuses, how it is searched."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_knnmt.retrieval import (
    DamagedDatastoreError,
    Datastore,
    DatastoreWriter,
    FlatIndex,
    Recorder,
    Retriever,
    StaleDatastoreError,
    keys_of,
)

M, D, V = 30, 6, 11
RNG = np.random.default_rng(1)
KEYS = RNG.normal(size=(M, D)).astype(np.float16)
VALUES = RNG.integers(0, V, M)
SOURCES: dict[str, Any] = {"model_fingerprint": "f", "tokenizer_digest": "t", "corpus_digest": "c"}
OURS: dict[str, Any] = {"fingerprint": "f", "tokenizer_digest": "t"}


def build(directory: Path, **more: Any) -> Datastore:
    writer = DatastoreWriter.create(directory, M, D)
    writer.write(np.arange(M), KEYS, VALUES)
    return writer.commit(M, corpus_name="toy", **SOURCES, **more)


def rewrite_manifest(store: Datastore, **changes: Any) -> None:
    path = store.directory / "manifest.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_an_older_manifest_means_the_output_projections_inputs(tmp_path: Path) -> None:
    store = build(tmp_path / "store")
    rewrite_manifest(store, key_layer=None)
    assert "key_layer" not in (tmp_path / "store" / "manifest.json").read_text()
    again = Datastore.open(store.directory)
    assert again.manifest.key_layer == "opl_input"
    again.require(**OURS)


def test_a_datastore_of_one_layer_is_refused_for_another(tmp_path: Path) -> None:
    store = build(tmp_path / "store", key_layer="ffn_input")
    store = Datastore.open(store.directory)
    store.require(**OURS, key_layer="ffn_input")
    with pytest.raises(StaleDatastoreError) as refused:
        store.require(**OURS)
    assert str(refused.value) == (
        f"The keys of the datastore in {store.directory} are the last feed-forward network's "
        "inputs (ffn_input), but the output projection's inputs (opl_input) are needed here: give "
        "another directory, or for retrieval set knn.key_layer=ffn_input."
    )
    with pytest.raises(StaleDatastoreError, match=r"projection's inputs \(opl_input\), but the la"):
        build(tmp_path / "other").require(**OURS, key_layer="ffn_input")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("attention", "has key layer 'attention', but this program knows opl_input, ffn_input. Bu"),
        (3, "has no valid entry for key_layer. Delete"),
    ],
)
def test_an_unknown_layer_is_refused(tmp_path: Path, wrong: Any, message: str) -> None:
    store = build(tmp_path / "store")
    rewrite_manifest(store, key_layer=wrong)
    with pytest.raises(DamagedDatastoreError, match=message):
        Datastore.open(store.directory)


def test_keys_are_the_second_half() -> None:
    hidden = torch.arange(24.0).view(2, 2, 6)
    assert keys_of(hidden, "opl_input") is hidden
    assert keys_of(hidden, "ffn_input").tolist() == [[[3, 4, 5], [9, 10, 11]],
                                                     [[15, 16, 17], [21, 22, 23]]]  # fmt: skip


class Uniform:
    """A model's own distribution that looks at the first D numbers alone."""

    def __call__(self, hidden: Tensor) -> Tensor:
        raise AssertionError("the sparse form asks for the best tokens")

    def top_with(self, hidden: Tensor, n: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([tokens[:, :n], tokens], dim=1)
        return hidden[:, :1] - tokens.float(), tokens


def test_the_second_half_is_searched_for_and_recorded() -> None:
    generator = torch.Generator().manual_seed(2)
    both = torch.randn(7, 2 * D, generator=generator).half().float()
    retriever = Retriever(torch.from_numpy(VALUES), FlatIndex(KEYS), 4, "ffn_input")
    distances = np.square(both[:, None, D:].double().numpy() - KEYS.astype(float)).sum(-1)  # [7, M]
    entries = distances.argsort(axis=1)[:, :4]
    neighbours = retriever(both)
    assert neighbours.entries.tolist() == entries.tolist()
    assert neighbours.tokens.tolist() == VALUES[entries].tolist()
    np.testing.assert_allclose(neighbours.distances, np.sort(distances)[:, :4], rtol=1e-5)

    recorder = Recorder(retriever, Uniform(), keep_queries=True)
    recorder.write(both, torch.arange(7), torch.zeros(7, dtype=torch.int64))
    record = recorder.finish()
    assert record.queries is not None
    assert torch.equal(record.queries, both[:, D:])
    torch.testing.assert_close(record.gold_log_probs, both[:, 0] - torch.arange(7))


@pytest.mark.parametrize(("key_layer", "width"), [("opl_input", 2 * D), ("ffn_input", D)])
def test_queries_of_the_other_layer_are_never_searched_for(key_layer: Any, width: int) -> None:
    retriever = Retriever(torch.from_numpy(VALUES), FlatIndex(KEYS), 4, key_layer)
    with pytest.raises(RuntimeError, match="shapes"):
        retriever(torch.zeros(2, width))
