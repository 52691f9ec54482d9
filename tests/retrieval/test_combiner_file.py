"""A combiner comes back from its file as it was, and no other file passes for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_knnmt.retrieval import Neighbours
from lightning_knnmt.retrieval.adaptive import AdaptiveCombiner, KNNBoxCombiner
from lightning_knnmt.retrieval.combiner_file import load_combiner, save_combiner
from lightning_knnmt.retrieval.errors import CombinerError

SOURCES = {"corpus": "a1", "index": "exact (l2, cpu)"}
K = 4


def some_neighbours() -> Neighbours:
    tokens = torch.tensor([[0, 2, 0, 1], [3, 3, 3, 3]])
    return Neighbours(tokens, torch.tensor([[1.0, 5.0, 20.0, 21.0], [0.0, 0.5, 7.0, 90.0]]), tokens)


@pytest.mark.parametrize(
    "combiner",
    [
        AdaptiveCombiner(K, 12.0, 5, distance_offset=-3.0),
        KNNBoxCombiner(K, 7.5),
        KNNBoxCombiner(K, 1.0, learn_temperature=True),
    ],
    ids=["adaptive", "knn-box", "temperature"],
)
def test_it_comes_back_as_it_was(combiner: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "combiner.safetensors"
    save_combiner(combiner, path, SOURCES)
    before = torch.get_rng_state()
    loaded = load_combiner(path, SOURCES, num_neighbours=K)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(loaded) is type(combiner)
    assert loaded.settings == combiner.settings
    for one, other in zip(loaded(some_neighbours()), combiner(some_neighbours()), strict=True):
        assert torch.equal(one, other)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_one_loaded_during_an_evaluation_can_be_trained(tmp_path: Path) -> None:
    save_combiner(AdaptiveCombiner(K, 12.0), tmp_path / "c", SOURCES)
    with torch.inference_mode():
        loaded = load_combiner(tmp_path / "c")
    loaded(some_neighbours()).knn_weight.sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_another_k_or_source_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "combiner.safetensors"
    save_combiner(AdaptiveCombiner(K, 12.0), path, SOURCES)
    with pytest.raises(CombinerError) as raised:
        load_combiner(path, num_neighbours=8)
    assert str(raised.value) == (
        f"The combiner in {path} was trained for k_max = 4, not 8: retrieve 4 neighbours, or "
        "train another for 8."
    )
    with pytest.raises(CombinerError, match=r"these differ: corpus, model\. Train it again"):
        load_combiner(path, SOURCES | {"corpus": "b2", "model": "c3"})


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "combiner.safetensors"
    with pytest.raises(CombinerError, match="There is no combiner at"):
        load_combiner(path)
    save_combiner(AdaptiveCombiner(K, 12.0), path, SOURCES)
    whole = path.read_bytes()
    for length in (0, 5, 200, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CombinerError, match="cannot be read as safetensors"):
            load_combiner(path)
    save_file({"a": torch.zeros(1)}, path, {"format": "lightning_knnmt adapters 1"})
    with pytest.raises(CombinerError, match="holds 'lightning_knnmt adapters 1', but only"):
        load_combiner(path)
    metadata = {
        "format": "lightning_knnmt combiner 1",
        "variant": "adaptive",
        "settings": json.dumps(AdaptiveCombiner(K, 12.0).settings),
        "sources": "{}",
    }
    for wrong in ({"variant": "other"}, {"settings": "{"}, {}):  # the last lacks its weights
        save_file({"a": torch.zeros(1)}, path, metadata | wrong)
        with pytest.raises(CombinerError, match="do not make a combiner"):
            load_combiner(path)
