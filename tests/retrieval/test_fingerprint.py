import copy
import hashlib
import json

import torch

from lightning_knnmt.models import Transformer
from lightning_knnmt.retrieval import fingerprint


def test_it_ignores_the_output_projection_alone(tiny_model: Transformer) -> None:
    other = copy.deepcopy(tiny_model)
    other.output_projection.weight = torch.nn.Parameter(other.output_projection.weight + 1)
    assert fingerprint(other) == fingerprint(tiny_model)
    for name, parameter in other.named_parameters():
        if name.startswith("output_projection"):
            continue
        with torch.no_grad():
            parameter.view(-1)[0] += 1e-3
        assert fingerprint(other) != fingerprint(tiny_model), name
        with torch.no_grad():
            parameter.copy_(dict(tiny_model.named_parameters())[name])


def test_tied_embeddings_count(tiny_model: Transformer) -> None:
    before = fingerprint(tiny_model)
    assert tiny_model.output_projection.weight is tiny_model.target_embedding.weight
    with torch.no_grad():
        tiny_model.output_projection.weight[5, 0] += 1
    assert fingerprint(tiny_model) != before


def test_precision_and_settings_without_weights_count(tiny_model: Transformer) -> None:
    other = Transformer(**(tiny_model.config | {"activation": "gelu"}))
    other.load_state_dict(tiny_model.state_dict())
    assert (
        len({fingerprint(tiny_model), fingerprint(tiny_model, "bf16-mixed"), fingerprint(other)})
        == 3
    )


def test_what_comes_after_the_key_does_not_count(tiny_model: Transformer) -> None:
    """A bias of the output projection, or which matrices are one: the keys are the same."""
    changes = {"tied_embeddings": "none", "output_bias": True, "dropout": 0.7}
    other = Transformer(**(tiny_model.config | changes))
    other.load_state_dict(tiny_model.state_dict(), strict=False)  # all but the bias
    assert fingerprint(other) == fingerprint(tiny_model)


def test_the_default_key_layer_is_not_in_the_fingerprint(
    tiny_model: Transformer,
) -> None:
    """The rule written out: datastores from before there was a choice stay valid."""
    settings = dict(tiny_model.config)
    for name in ("tied_embeddings", "output_bias", "dropout"):
        del settings[name]
    del settings["attention_dropout"], settings["activation_dropout"]
    sha = hashlib.sha256(json.dumps(["32-true", settings], sort_keys=True).encode())
    for name, tensor in sorted(tiny_model.state_dict().items()):
        if not name.startswith("output_projection."):
            sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            sha.update(tensor.numpy().tobytes())
    assert fingerprint(tiny_model) == sha.hexdigest()
    assert fingerprint(tiny_model, key_layer="ffn_input") != sha.hexdigest()
