"""Which parameters train, and that nothing else moves: without Lightning."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_knnmt.models import Transformer
from lightning_knnmt.retrieval import fingerprint
from lightning_knnmt.training.trainable import (
    train_adapters,
    train_all,
    train_lora,
    train_output_projection,
)

SOURCE = torch.tensor([[5, 6, 7, 3], [8, 9, 3, 0]])
TARGET = torch.tensor([[2, 9, 8, 7], [2, 6, 5, 4]])


def variant(tiny_model: Transformer, **changes: Any) -> Transformer:
    return Transformer(**(tiny_model.config | changes)).eval()


def one_step(model: Transformer) -> set[str]:
    """The names in the state whose numbers one optimizer step changes."""
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    logits = model.output_projection(model(SOURCE, TARGET).hidden)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), TARGET.roll(-1, 1).flatten()).backward()
    optimizer.step()
    return {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}


def hidden(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model(SOURCE, TARGET).hidden


def copied(model: Transformer) -> Transformer:
    """Rebuilt from what a checkpoint holds of it."""
    rebuilt = Transformer(**model.config).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert rebuilt.config == model.config
    return rebuilt


# Full


def test_full_fine_tuning_trains_everything(tiny_model: Transformer) -> None:
    tiny_model.requires_grad_(False)
    assert train_all(tiny_model) == [name for name, _ in tiny_model.named_parameters()]
    assert one_step(tiny_model) == set(tiny_model.state_dict())


# Output projection


@pytest.mark.parametrize("tied", ["all", "decoder", "embeddings", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_projection_trains_alone_however_it_was_tied(
    tiny_model: Transformer, tied: str, bias: bool
) -> None:
    model = variant(tiny_model, tied_embeddings=tied, output_bias=bias)
    before, number = hidden(model), fingerprint(model)
    embeddings = [model.source_embedding.weight.clone(), model.target_embedding.weight.clone()]
    logits = model.output_projection(before)
    names = ["output_projection.weight"] + ["output_projection.bias"] * bias
    assert train_output_projection(model) == names
    assert torch.equal(model.output_projection(before), logits)
    assert fingerprint(model) == number
    assert one_step(model) == set(names)
    assert torch.equal(model.source_embedding.weight, embeddings[0])
    assert torch.equal(model.target_embedding.weight, embeddings[1])
    assert torch.equal(hidden(model), before)
    assert fingerprint(model) == number == fingerprint(copied(model))


@pytest.mark.parametrize(
    ("tied", "untied"),
    [("all", "embeddings"), ("decoder", "none"), ("embeddings", "embeddings"), ("none", "none")],
)
def test_untying_keeps_what_else_is_tied(tiny_model: Transformer, tied: str, untied: str) -> None:
    model = variant(tiny_model, tied_embeddings=tied)
    original = model.config.copy()
    given = model.config
    train_output_projection(model)
    assert model.config == original | {"tied_embeddings": untied}
    assert given == original  # whoever was given the config before still reads what it was
    for each in (model, copied(model)):
        assert each.output_projection.weight is not each.target_embedding.weight
        shared = each.source_embedding.weight is each.target_embedding.weight
        assert shared == (untied == "embeddings")


def test_untied_weights_that_differ_survive_the_copy(tiny_model: Transformer) -> None:
    train_output_projection(tiny_model)
    one_step(tiny_model)
    other = copied(tiny_model)
    assert torch.equal(other.output_projection.weight, tiny_model.output_projection.weight)
    assert not torch.equal(other.output_projection.weight, other.target_embedding.weight)


# Adapters

# The tiny model has 2 encoder layers of 2 sub-layers and 1 decoder layer of 3.
PLACES = [
    ("all", "both", 7),
    ("all", "encoder", 4),
    ("all", "decoder", 3),
    ("ffn", "both", 3),
    ("ffn", "encoder", 2),
    ("ffn", "decoder", 1),
]


@pytest.mark.parametrize(("placement", "stacks", "count"), PLACES)
def test_adapters_train_alone_where_they_were_asked_for(
    tiny_model: Transformer, placement: Any, stacks: Any, count: int
) -> None:
    base = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    names = train_adapters(5, placement, stacks)(tiny_model)
    assert set(names) == set(tiny_model.state_dict()) - set(base)
    assert len(names) == 4 * count
    stack = {"both": ("encoder", "decoder")}.get(stacks, (stacks,))
    assert all(name.startswith(stack) for name in names)
    assert all(".ffn_residual.adapter." in name for name in names) == (placement == "ffn")
    sizes = [p.numel() for p in tiny_model.parameters() if p.requires_grad]
    assert sum(sizes) == count * (2 * 24 * 5 + 5 + 24)
    moved = one_step(tiny_model)
    assert moved == {name for name in names if ".up." in name}  # zero `up` hides `down` at first
    assert one_step(tiny_model) > moved
    for name, tensor in base.items():
        assert torch.equal(tiny_model.state_dict()[name], tensor)


def test_every_adapter_weight_of_a_plain_start_moves_at_once(tiny_model: Transformer) -> None:
    names = train_adapters(5, init="plain")(tiny_model)
    assert one_step(tiny_model) == set(names)


def test_as_many_parameters_as_the_papers_model_has() -> None:
    """30 adapters on WMT19 de-en: 3,964,800 / 7,898,880 / 15,767,040 by the formula."""
    for bottleneck, expected in {64: 3_964_800, 128: 7_898_880, 256: 15_767_040}.items():
        with torch.device("meta"):  # shapes, no numbers
            model = Transformer(
                vocab_size=42_024, pad_id=1, start_id=2, eos_id=2, model_dim=1024, num_heads=16,
                encoder_ffn_dim=8192, decoder_ffn_dim=4096,
            )  # fmt: skip
            train_adapters(bottleneck)(model)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize("training", [True, False])
def test_a_fresh_identity_adapter_changes_nothing(tiny_model: Transformer, training: bool) -> None:
    tiny_model.train(training)
    torch.manual_seed(3)
    before = hidden(tiny_model.eval())
    tiny_model.train(training)
    train_adapters(5)(tiny_model)
    assert all(module.training == training for module in tiny_model.modules())
    assert torch.equal(hidden(tiny_model.eval()), before)


def test_a_plain_adapter_changes_the_output(tiny_model: Transformer) -> None:
    before = hidden(tiny_model)
    train_adapters(5, init="plain")(tiny_model)
    assert not torch.allclose(hidden(tiny_model), before, atol=1e-2)


def test_adapters_change_the_fingerprint_and_training_changes_it_again(
    tiny_model: Transformer,
) -> None:
    numbers = [fingerprint(tiny_model)]
    train_adapters(5)(tiny_model)
    numbers.append(fingerprint(tiny_model))
    one_step(tiny_model)
    numbers.append(fingerprint(tiny_model))
    assert len(set(numbers)) == 3
    assert fingerprint(copied(tiny_model)) == numbers[-1]


def test_adapters_survive_the_copy(tiny_model: Transformer) -> None:
    train_adapters(5, "ffn", "decoder")(tiny_model)
    one_step(tiny_model)
    assert tiny_model.config["adapters"] == {
        "bottleneck_dim": 5,
        "placement": "ffn",
        "stacks": "decoder",
    }
    assert torch.equal(hidden(copied(tiny_model)), hidden(tiny_model))


def test_the_same_adapters_train_on_and_others_are_refused(tiny_model: Transformer) -> None:
    names = train_adapters(5, init="plain")(tiny_model)
    before = copy.deepcopy(tiny_model.state_dict())
    assert train_adapters(5)(copied(tiny_model)) == names
    for name, tensor in copied(tiny_model).state_dict().items():
        assert torch.equal(tensor, before[name])
    with pytest.raises(ValueError, match=r"adapters.*'bottleneck_dim': 5"):
        train_adapters(6)(tiny_model)


def test_an_adapter_has_its_models_device_and_dtype(tiny_model: Transformer) -> None:
    train_adapters(5)(tiny_model.double())
    assert {parameter.dtype for parameter in tiny_model.parameters()} == {torch.float64}


# LoRA


@pytest.mark.parametrize("cell", ["attention", "ssru"])
def test_low_rank_updates_train_alone_and_begin_as_nothing(
    tiny_model: Transformer, cell: str
) -> None:
    model = variant(tiny_model, decoder_cell=cell)
    base, before = copy.deepcopy(model.state_dict()), hidden(model)
    names = train_lora(3, 6)(model)
    assert set(names) == set(model.state_dict()) - set(base)
    assert not any(module.training for module in model.modules())
    assert torch.equal(hidden(model), before)
    # r (D + outputs) for each projection: 2 encoder layers, cross-attention and the cell.
    outputs = 2 * (72, 24) + (24, 48, 24) + {"attention": (72, 24), "ssru": (48,)}[cell]
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sum(sizes) == sum(3 * (24 + rows) for rows in outputs)
    moved = one_step(model)
    assert moved == {name for name in names if ".up." in name}  # zero B hides A at first
    assert one_step(model) == set(names)
    for name, tensor in base.items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_training_low_rank_updates_changes_the_fingerprint_and_they_survive_the_copy(
    tiny_model: Transformer,
) -> None:
    numbers, states = [fingerprint(tiny_model)], [hidden(tiny_model)]
    train_lora(3, 6)(tiny_model)
    assert tiny_model.config["adapters"] == {"rank": 3, "alpha": 6.0}
    for _ in range(2):
        numbers.append(fingerprint(tiny_model))
        one_step(tiny_model)
    numbers.append(fingerprint(tiny_model))
    states.append(hidden(tiny_model))
    assert len(set(numbers)) == 4
    assert not torch.equal(states[0], states[1])
    other = copied(tiny_model)
    assert fingerprint(other) == numbers[-1]
    assert torch.equal(hidden(other), states[-1])


def test_the_same_low_rank_updates_train_on_and_others_and_adapters_are_refused(
    tiny_model: Transformer,
) -> None:
    names = train_lora(3, 6)(tiny_model.double())
    assert {parameter.dtype for parameter in tiny_model.parameters()} == {torch.float64}
    one_step(tiny_model)
    before = hidden(tiny_model)
    assert train_lora(3, 6.0)(tiny_model) == names
    assert torch.equal(hidden(tiny_model), before)
    refused = r"adapters.*{'rank': 3, 'alpha': 6.0}"
    with pytest.raises(ValueError, match=refused):
        train_lora(4, 6)(tiny_model)
    with pytest.raises(ValueError, match=refused):
        train_adapters(5)(tiny_model)


def test_low_rank_updates_are_refused_where_there_are_adapters(tiny_model: Transformer) -> None:
    train_adapters(5)(tiny_model)
    with pytest.raises(ValueError, match=r"adapters.*'bottleneck_dim': 5"):
        train_lora(3, 6)(tiny_model)


def test_methods_follow_each_other(tiny_model: Transformer) -> None:
    """Each decides alone: what trained before no longer does."""
    adapters = train_adapters(5)(tiny_model)
    assert train_output_projection(tiny_model) == ["output_projection.weight"]
    assert one_step(tiny_model) == {"output_projection.weight"}
    assert train_adapters(5)(tiny_model) == adapters
    tiny_model.zero_grad()
    assert one_step(tiny_model) == {name for name in adapters if ".up." in name}
    assert set(train_all(tiny_model)) > set(adapters)
