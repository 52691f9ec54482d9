"""The mean of several checkpoints' weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_knnmt.data import FairseqTokenizer
from lightning_knnmt.data.fairseq.dictionary import SPECIALS, FairseqDictionary
from lightning_knnmt.data.fairseq.tokenizer import Side
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained import CheckpointError, checkpoint_entry, load_pretrained
from lightning_knnmt.pretrained.load import average


def random_model(seed: int, **changes: Any) -> Transformer:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 7,
        "pad_id": 1,
        "start_id": 2,
        "eos_id": 2,
        "model_dim": 4,
        "num_heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 6,
        "decoder_ffn_dim": 6,
    }
    return Transformer(**settings | changes)


def write(path: Path, model: Transformer, last: str = "c") -> Path:
    side = Side(FairseqDictionary((*SPECIALS, "a", "b", last)))
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    entry = checkpoint_entry(model, FairseqTokenizer(side, side))
    torch.save(entry | {"state_dict": weights}, path)
    return path


def test_every_weight_is_the_mean(tmp_path: Path) -> None:
    models = [random_model(seed) for seed in range(3)]
    paths = [write(tmp_path / f"{i}.ckpt", model) for i, model in enumerate(models)]
    averaged, tokenizer = load_pretrained(paths)
    assert tokenizer.encode_source(["a b"]) == [[4, 5, 2]]
    for name, tensor in averaged.state_dict().items():
        each = [model.state_dict()[name].double().numpy() for model in models]
        np.testing.assert_allclose(tensor.numpy(), np.mean(each, axis=0), atol=1e-7)
    assert averaged.output_projection.weight is averaged.target_embedding.weight
    assert not averaged.training


def test_one_model_stays_as_it_is() -> None:
    model = random_model(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert average([model]) is model
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_models_of_different_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Model 2\b.*norm is 'pre'"):
        average([random_model(0), random_model(0, norm="pre")])
    with pytest.raises(CheckpointError, match="at least one"):
        load_pretrained([])
    paths = [write(tmp_path / f"{word}.ckpt", random_model(0), word) for word in "cd"]
    with pytest.raises(CheckpointError, match=r"c\.ckpt, .*d\.ckpt .*tokenizers"):
        load_pretrained(paths)
