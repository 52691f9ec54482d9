"""Whose inputs a datastore's keys are: what it says, what it rejects, how it is searched."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_knnmt.models import DecoderStates
from lightning_knnmt.retrieval import (
    Datastore,
    FlatIndex,
    LocalSource,
    Recorder,
    Retriever,
    StaleDatastoreError,
)
from lightning_knnmt.retrieval.errors import DamagedDatastoreError
from lightning_knnmt.retrieval.writer import DatastoreWriter

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


@pytest.mark.parametrize(
    ("theirs", "ours"), [("opl_input", "ffn_input"), ("ffn_input", "opl_input")]
)
def test_a_datastore_of_one_layer_is_rejected_for_another(
    tmp_path: Path, theirs: Any, ours: Any
) -> None:
    build(tmp_path / "store", key_layer=theirs)
    store = Datastore.open(tmp_path / "store")
    store.require(**OURS, key_layer=theirs)
    with pytest.raises(StaleDatastoreError, match=rf"{ours}.*knn\.key_layer={theirs}"):
        store.require(**OURS, key_layer=ours)


@pytest.mark.parametrize(
    ("wrong", "named"), [("attention", "'attention'"), (3, "key_layer"), (None, "key_layer")]
)
def test_an_unknown_layer_is_rejected(tmp_path: Path, wrong: Any, named: str) -> None:
    path = build(tmp_path / "store").directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"key_layer": wrong}))
    with pytest.raises(DamagedDatastoreError, match=named):
        Datastore.open(tmp_path / "store")


class FirstValue:
    """A model's own distribution that looks at the hidden states alone."""

    def __call__(self, states: DecoderStates, rows: Tensor | None = None) -> Tensor:
        raise AssertionError("the sparse form asks for the best tokens")

    def top_with(self, states: DecoderStates, n: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([tokens[:, :n], tokens], dim=1)
        return states.hidden[:, :1] - tokens.float(), tokens


@pytest.mark.parametrize("layer", ["opl_input", "ffn_input"])
def test_the_layers_own_inputs_are_searched_for_and_recorded(layer: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden, read = torch.randn(2, 7, D, generator=generator).half().float()
    states = DecoderStates(hidden, read)
    queries = {"opl_input": hidden, "ffn_input": read}[layer]
    retriever = Retriever(LocalSource(FlatIndex(KEYS), VALUES), 4, layer)
    distances = np.square(queries[:, None].double().numpy() - KEYS.astype(float)).sum(-1)  # [7, M]
    entries = distances.argsort(axis=1)[:, :4]
    neighbours = retriever(states)
    assert neighbours.entries.tolist() == entries.tolist()
    assert neighbours.tokens.tolist() == VALUES[entries].tolist()
    np.testing.assert_allclose(neighbours.distances, np.sort(distances)[:, :4], rtol=1e-5)

    recorder = Recorder(retriever, FirstValue(), keep_queries=True)
    recorder.write(states, torch.arange(7), torch.zeros(7, dtype=torch.int64))
    record = recorder.finish()
    assert record.queries is not None
    assert torch.equal(record.queries, queries)
    torch.testing.assert_close(record.gold_log_probs, hidden[:, 0] - torch.arange(7))


def test_states_without_the_layer_are_rejected() -> None:
    retriever = Retriever(LocalSource(FlatIndex(KEYS), VALUES), 4, "ffn_input")
    with pytest.raises(ValueError, match="ffn_input"):
        retriever(DecoderStates(torch.zeros(2, D)))


def test_keys_of_another_width_are_never_searched() -> None:
    retriever = Retriever(LocalSource(FlatIndex(KEYS), VALUES), 4)
    with pytest.raises(RuntimeError, match="shapes"):
        retriever(DecoderStates(torch.zeros(2, 2 * D)))
