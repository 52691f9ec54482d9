"""fairseq's checkpoints in every layout, written here, against torch's own Transformer layers."""

import copy
import math
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from lightning_knnmt.data import tokenizer_from_state
from lightning_knnmt.pretrained import FairseqError, load_fairseq, load_pretrained

DIM, HEADS, PAD, EOS = 8, 2, 1, 2
WORDS = {"de": ["ein", "Haus", "am", "Se@@", "e", "."], "en": ["a", "house", "by", "a@@", "sea"]}
CODES = ["S e", "e i", "ei n</w>", "H a", "Ha u", "Hau s</w>", "a m</w>"]


@dataclass(frozen=True)
class Kind:
    """What a witness is made of."""

    norm_first: bool = False
    activation: str = "relu"
    learned: tuple[bool, bool] = (False, False)
    tied: str = "all"  # or "decoder", "none"
    no_scale: bool = False


KINDS = {
    "wmt19": Kind(),
    "pre-norm": Kind(norm_first=True, activation="gelu", tied="decoder"),
    "learned": Kind(learned=(True, True), tied="none"),
    "learned source": Kind(learned=(True, False), no_scale=True),
}


class Witness(nn.Module):
    """fairseq's Transformer, of torch's layers."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.sizes = [4 + len(WORDS[lang]) for lang in ("de", "en")]
        if kind.tied == "all":
            self.sizes = [4 + len({*WORDS["de"], *WORDS["en"]})] * 2
        common: dict[str, Any] = {
            "dropout": 0.0,
            "activation": kind.activation,
            "batch_first": True,
            "norm_first": kind.norm_first,
        }
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(DIM, HEADS, 12, **common) for _ in range(2)
        )
        self.decoder = nn.ModuleList(
            nn.TransformerDecoderLayer(DIM, HEADS, 6, **common) for _ in "1"
        )
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        embeddings = [nn.Embedding(size, DIM) for size in self.sizes]
        self.source, self.target = embeddings if kind.tied != "all" else embeddings[:1] * 2
        self.output = nn.Linear(DIM, self.sizes[1], bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, float(parameter.dim() == 1), 0.4)
        with torch.no_grad():
            self.source.weight[PAD] = self.target.weight[PAD] = 0
        if kind.tied != "none":
            self.output.weight = self.target.weight
        self.tables = [
            torch.randn(PAD + 1 + 16, DIM) if learned else self.waves(PAD + 1 + 16)
            for learned in kind.learned
        ]
        self.eval()

    def waves(self, rows: int) -> Tensor:
        """The sines of row p, then its cosines; the rows up to the padding's stay unused."""
        half = DIM // 2
        rates = [math.exp(-math.log(10000) * i / (half - 1)) for i in range(half)]
        table = [
            [math.sin(p * r) for r in rates] + [math.cos(p * r) for r in rates] for p in range(rows)
        ]
        return torch.tensor(table)

    def embed(self, ids: Tensor, side: int) -> Tensor:
        embedding = (self.source, self.target)[side](ids)
        places = torch.tensor(
            [
                [PAD + sum(i != PAD for i in row[: n + 1]) for n in range(len(row))]
                for row in ids.tolist()
            ]
        )
        scaled: Tensor = embedding * (1.0 if self.kind.no_scale else DIM**0.5)
        return scaled + self.tables[side][places]

    def forward(self, source_ids: Tensor, decoder_input: Tensor) -> Tensor:
        """Logits, [B, T, V]."""
        padding = source_ids == PAD
        states = self.embed(source_ids, 0)
        for layer in self.encoder:
            states = layer(states, src_key_padding_mask=padding)
        if self.kind.norm_first:
            states = self.norms[0](states)
        x = self.embed(decoder_input, 1)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        for layer in self.decoder:
            x = layer(x, states, tgt_mask=causal, memory_key_padding_mask=padding)
        logits: Tensor = self.output(self.norms[1](x) if self.kind.norm_first else x)
        return logits

    def settings(self) -> dict[str, Any]:
        kind = self.kind
        return {
            "arch": "transformer_iwslt_de_en",
            "task": "translation",
            "source_lang": "de",
            "target_lang": "en",
            "encoder_layers": 2,
            "decoder_layers": 1,
            **{f"{side}_embed_dim": DIM for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")},
            **{f"{side}_normalize_before": kind.norm_first for side in ("encoder", "decoder")},
            "encoder_learned_pos": kind.learned[0],
            "decoder_learned_pos": kind.learned[1],
            "activation_fn": kind.activation,
            "share_all_embeddings": kind.tied == "all",
            "share_decoder_input_output_embed": kind.tied != "none",
            "no_scale_embedding": kind.no_scale,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "dropout": 0.3,
            "attention_dropout": 0.1,
            "layernorm_embedding": False,
            "adaptive_softmax_cutoff": None,
        }

    def weights(self) -> dict[str, Tensor]:
        """As fairseq 0.9 names them, with fused projections."""
        names = [
            (r"^encoder\.(\d)\.(.*)", r"encoder.layers.\1.\2"),
            (r"^decoder\.(\d)\.(.*)", r"decoder.layers.\1.\2"),
            (r"multihead_attn", "encoder_attn"),
            (r"linear(\d)", r"fc\1"),
            (r"^norms\.0", "encoder.layer_norm"),
            (r"^norms\.1", "decoder.layer_norm"),
            (r"^source\.", "encoder.embed_tokens."),
            (r"^target\.", "decoder.embed_tokens."),
            (r"^output\.", "decoder.output_projection."),
            (r"norm1", "self_attn_layer_norm"),
            (r"(encoder\.layers\.\d\.)norm2", r"\1final_layer_norm"),
            (r"norm2", "encoder_attn_layer_norm"),
            (r"norm3", "final_layer_norm"),
        ]
        weights = {}
        for name, tensor in self.state_dict().items():
            if name.startswith("norms") and not self.kind.norm_first:
                continue
            for pattern, replacement in names:
                name = re.sub(pattern, replacement, name)
            weights[name] = tensor.clone()
        for side, learned, table in zip(
            ("encoder", "decoder"), self.kind.learned, self.tables, strict=True
        ):
            place = f"{side}.embed_positions"
            weights |= (
                {f"{place}.weight": table} if learned else {f"{place}._float_tensor": torch.ones(1)}
            )
            weights[f"{side}.version"] = torch.tensor([3.0])
        return weights


def split(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Separate projections, as from fairseq 0.9 on."""
    result = {}
    for name, tensor in weights.items():
        if "in_proj_" in name:
            for each, part in zip(
                "qkv", (tensor[:DIM], tensor[DIM : 2 * DIM], tensor[2 * DIM :]), strict=True
            ):
                result[name.replace("in_proj_", f"{each}_proj.")] = part
        else:
            result[name] = tensor
    return result


def oldest(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Numbered norms, and the output projection only where it is not an embedding."""
    numbers = {
        "encoder": ["self_attn_layer_norm", "final_layer_norm"],
        "decoder": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"],
    }
    result = {}
    for name, tensor in weights.items():
        if name == "decoder.output_projection.weight":
            if not torch.equal(tensor, weights["decoder.embed_tokens.weight"]):
                result["decoder.embed_out"] = tensor
            continue
        for number, norm in enumerate(numbers[name.split(".")[0]]):
            name = name.replace(f".{norm}.", f".layer_norms.{number}.")
        result[name] = tensor
    return result


def with_copies(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Beside the encoder's weights others that fairseq 0.12 saves and never trains."""
    copies = {
        f"encoder.layers.{i}.{part}_weight": torch.randn(3, 3)
        for i in range(2)
        for part in ("in_proj", "out_proj", "fc1", "fc2")
    }
    return copies | weights


def namespace(settings: dict[str, Any]) -> dict[str, Any]:
    return {"args": Namespace(**settings)}


def cfg(settings: dict[str, Any]) -> dict[str, Any]:
    """Version 0.12: a table of tables, the model's still a Namespace."""
    task = {"_name": "translation", "source_lang": "de", "target_lang": "en"}
    return {"args": None, "cfg": {"_name": None, "model": Namespace(**settings), "task": task}}


def omegaconf(settings: dict[str, Any]) -> dict[str, Any]:
    """Version 0.10: objects of omegaconf, here with the encoder's settings in a table of theirs."""
    model = {name: value for name, value in settings.items() if not name.startswith("encoder_")}
    model["encoder"] = {
        name.removeprefix("encoder_"): value
        for name, value in settings.items()
        if name.startswith("encoder_")
    }
    return {"args": None, "cfg": OmegaConf.create(cfg(settings)["cfg"] | {"model": model})}


LAYOUTS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], bool]] = {
    "0.6": (lambda weights: oldest(weights), namespace, False),
    "0.9": (split, namespace, True),
    "0.10": (split, omegaconf, True),
    "0.12": (lambda weights: with_copies(split(weights)), cfg, True),
}


def write(directory: Path, witness: Witness, layout: str = "0.12", **changes: Any) -> Path:
    """A folder with checkpoint, dictionaries and codes."""
    directory.mkdir(parents=True, exist_ok=True)
    rename, arrange, zipped = LAYOUTS[layout]
    content = arrange(witness.settings() | changes) | {
        "model": rename(witness.weights()),
        "extra_state": {"epoch": 3, "best": np.float64(4.5)},
    }
    file = directory / "checkpoint_best.pt"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    joint = sorted({*WORDS["de"], *WORDS["en"]})
    for lang in ("de", "en"):
        words = joint if witness.kind.tied == "all" else WORDS[lang]
        (directory / f"dict.{lang}.txt").write_text("".join(f"{word} 1\n" for word in words))
    (directory / "bpecodes").write_text("#version: 0.2\n" + "\n".join(CODES))
    return file


@pytest.fixture
def witness() -> Witness:
    torch.manual_seed(1)
    return Witness(KINDS["wmt19"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_torchs_layers(kind: str, layout: str, tmp_path: Path) -> None:
    torch.manual_seed(list(KINDS).index(kind))
    witness = Witness(KINDS[kind])
    file = write(tmp_path, witness, layout)
    model, tokenizer = load_pretrained(file, text="segmented")
    assert not model.training
    assert tokenizer.vocabulary.size == witness.sizes[1]
    source = torch.tensor([[5, 6, 4, 7, EOS], [PAD, PAD, 8, 5, EOS]])
    decoder_input = torch.tensor([[EOS, 4, 5, 8], [EOS, 7, 8, 4]])
    with torch.no_grad():
        ours = model.output_projection(model(source, decoder_input).hidden)
        theirs = witness(source, decoder_input)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert theirs.std() > 0.1
    assert model.config["tied_embeddings"] == witness.kind.tied
    assert model.config["dropout"] == 0.3
    assert (model.start_id, model.eos_id, model.pad_id) == (EOS, EOS, PAD)


def test_half_precision_becomes_float32(witness: Witness, tmp_path: Path) -> None:
    file = write(tmp_path, copy.deepcopy(witness).half())
    model, _ = load_fairseq(file, text="segmented")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = witness.source.weight.half().float()
    assert torch.equal(model.source_embedding.weight, expected)


def test_text_of_every_state_is_read(witness: Witness, tmp_path: Path) -> None:
    pytest.importorskip("sacremoses")
    write(tmp_path, witness)
    for text, line in {
        "raw": "ein Haus am See.",
        "tokenized": "ein Haus am See .",
        "segmented": "ein Haus am Se@@ e .",
    }.items():
        _, tokenizer = load_pretrained(tmp_path, text=text)
        again = tokenizer_from_state(tokenizer.state())
        for each in (tokenizer, again):
            (ids,) = each.encode_source([line])
            joint = sorted({*WORDS["de"], *WORDS["en"]})
            assert ids == [4 + joint.index(piece) for piece in WORDS["de"]] + [EOS]
            assert each.decode(ids) == line
        assert again.digest == tokenizer.digest


def test_files_are_looked_for_in_a_data_bin_and_in_a_folder_given(
    witness: Witness, tmp_path: Path
) -> None:
    file = write(tmp_path / "model", witness)
    for folder in (tmp_path / "model" / "data-bin.de-en", tmp_path / "elsewhere"):
        folder.mkdir()
        for name in ("dict.de.txt", "dict.en.txt"):
            (folder / name).write_bytes((tmp_path / "model" / name).read_bytes())
    for name in ("dict.de.txt", "dict.en.txt"):
        (tmp_path / "model" / name).unlink()
    _, found = load_fairseq(file, text="tokenized")
    (tmp_path / "elsewhere" / "code").write_text("a b\n")
    _, given = load_fairseq(file, data_bin=tmp_path / "elsewhere", text="tokenized")
    assert found.target.dictionary == given.target.dictionary
    assert found.target.codes is not None
    assert given.target.codes is not None
    assert len(found.target.codes.merges) == len(CODES)
    assert given.target.codes.merges == (("a", "b"),)


def test_codes_of_one_side_alone_are_that_sides(witness: Witness, tmp_path: Path) -> None:
    file = write(tmp_path, witness)
    (tmp_path / "bpecodes.en").write_text("a b\n")
    _, tokenizer = load_fairseq(file, text="tokenized")
    assert tokenizer.source.codes is not None
    assert tokenizer.target.codes is not None
    assert len(tokenizer.source.codes.merges) == len(CODES)
    assert tokenizer.target.codes.merges == (("a", "b"),)


class Attack:
    """Makes a folder when it is unpickled by someone careless."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_executed(witness: Witness, tmp_path: Path, zipped: bool) -> None:
    file = write(tmp_path, witness)
    content = {"args": Namespace(x=Attack(tmp_path / "harm")), "model": witness.weights()}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FairseqError, match=r"checkpoint_best\.pt .*Nothing was run"):
        load_pretrained(tmp_path)
    assert not (tmp_path / "harm").exists()
    torch.load(file, weights_only=False)  # the file would have done it
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_named(witness: Witness, tmp_path: Path, zipped: bool) -> None:
    file = write(tmp_path, witness, "0.12" if zipped else "0.6")
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[200:210] = b"\xff" * 10
    for damaged in (b"", *(content[:n] for n in (100, len(content) // 2, -30)), bytes(flipped)):
        file.write_bytes(damaged)
        with pytest.raises(FairseqError, match=r"checkpoint_best\.pt .*damaged"):
            load_fairseq(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, r"model\.pt .*'model'"),
        ([1, 2], r"model\.pt .*'model'"),
        ({"model": {"a": torch.ones(1)}}, r"model\.pt .*'args'.*'cfg'"),
    ],
)
def test_other_files_are_told_apart(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(FairseqError, match=message):
        load_fairseq(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "lstm_wiseman_iwslt_de_en"}, "lstm_wiseman_iwslt_de_en"),
        ({"arch": "fconv"}, "fconv.*supported are transformer "),
        ({"arch": "transformer_lm_gpt"}, "transformer_lm_gpt"),
        ({"layernorm_embedding": True}, "layernorm_embedding: True"),
        ({"adaptive_softmax_cutoff": "9,9"}, "adaptive_softmax_cutoff: '9,9'"),
        ({"activation_fn": "tanh"}, "activation_fn: 'tanh'.*relu, gelu, swish"),
        ({"encoder_embed_dim": 16}, "encoder_embed_dim 16 and decoder_embed_dim 8"),
        ({"decoder_normalize_before": True}, "encoder_normalize_before False and decoder_n"),
        ({"encoder_layers": 0}, "encoder_layers: 0"),
        ({"encoder_layers": 3}, r"lacks encoder\.layers\.2\.self_attn\.q_proj\.weight"),
        ({"encoder_layers": 1}, r"\b16 tensors .*encoder\.layers\.1\.fc1\.bias"),
        ({"encoder_learned_pos": True}, r"lacks encoder\.embed_positions\.weight"),
        ({"source_lang": None}, "source_lang.*None"),
        ({"encoder_attention_heads": 3, "decoder_attention_heads": 3}, r"\b3 heads"),
    ],
)
def test_what_is_not_supported_is_named(
    witness: Witness, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = write(tmp_path, witness, "0.9", **changes)
    with pytest.raises(FairseqError, match=message) as error:
        load_fairseq(file, text="segmented")
    assert str(file) in str(error.value)


def test_another_task_is_refused(witness: Witness, tmp_path: Path) -> None:
    file = write(tmp_path, witness, "0.9", task="translation_multi_simple_epoch")
    with pytest.raises(FairseqError, match="task translation_multi_simple_epoch"):
        load_fairseq(file)


def test_an_output_projection_that_is_no_embedding_must_be_there(tmp_path: Path) -> None:
    torch.manual_seed(0)
    witness = Witness(replace(KINDS["wmt19"], tied="none"))
    file = write(tmp_path, witness, "0.9")
    content = torch.load(file, weights_only=False)
    del content["model"]["decoder.output_projection.weight"]
    torch.save(content, file)
    with pytest.raises(FairseqError, match=r"decoder\.output_projection\.weight"):
        load_fairseq(file)


def test_what_lies_beside_a_checkpoint_is_asked_for(witness: Witness, tmp_path: Path) -> None:
    with pytest.raises(FairseqError, match=r"absent\.pt"):
        load_fairseq(tmp_path / "absent.pt")
    file = write(tmp_path, witness)
    with pytest.raises(FairseqError, match=r"'plain'.*raw, tokenized, segm"):
        load_fairseq(file, text="plain")  # type: ignore[arg-type]
    (tmp_path / "bpecodes").rename(tmp_path / "a.code")
    (tmp_path / "b.code").write_text("a b\n")
    with pytest.raises(FairseqError, match=r"a\.code, b\.code\b"):
        load_fairseq(file, text="tokenized")
    for name in ("a.code", "b.code"):
        (tmp_path / name).unlink()
    with pytest.raises(FairseqError, match=r"bpecodes, .*text='segmented'"):
        load_fairseq(file)
    with (tmp_path / "dict.de.txt").open("a") as dictionary:
        dictionary.write("mehr 1\n")
    message = r"\b15 source .*source dictionary .*\b16\b"
    with pytest.raises(FairseqError, match=message):
        load_fairseq(file, text="segmented")
    larger = (tmp_path / "dict.de.txt").read_text()
    (tmp_path / "dict.de.txt").write_text(larger.removesuffix("mehr 1\n"))
    (tmp_path / "dict.en.txt").write_text(larger)
    with pytest.raises(FairseqError, match=message.replace("source", "target")):
        load_fairseq(file, text="segmented")
    (tmp_path / "dict.de.txt").write_text("mehr\n")
    with pytest.raises(FairseqError, match=r"dict\.de\.txt, line 1\b"):
        load_fairseq(file, text="segmented")
    (tmp_path / "dict.en.txt").unlink()
    with pytest.raises(FairseqError, match=r"dict\.de\.txt and dict\.en\.txt\b.*data_bin"):
        load_fairseq(file, text="segmented")


def test_a_folder_of_several_checkpoints_needs_a_choice(witness: Witness, tmp_path: Path) -> None:
    file = write(tmp_path, witness)
    for name in ("model1.pt", "model2.pt"):
        (tmp_path / name).write_bytes(file.read_bytes())
    load_fairseq(tmp_path, text="segmented")  # the best
    file.unlink()
    with pytest.raises(FairseqError, match=r"model1\.pt, model2\.pt"):
        load_fairseq(tmp_path, text="segmented")


class Choice(Enum):
    """Stands for fairseq's own classes, which are not importable where its files are read."""

    LEGACY = "legacy_ddp"


def test_settings_of_fairseqs_own_classes_are_read(
    witness: Witness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("fairseq.dataclass.constants")
    monkeypatch.setitem(sys.modules, "fairseq", ModuleType("fairseq"))
    monkeypatch.setitem(sys.modules, "fairseq.dataclass", ModuleType("fairseq.dataclass"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.Choice = Choice  # type: ignore[attr-defined]
    monkeypatch.setattr(Choice, "__module__", module.__name__)
    file = write(tmp_path, witness, "0.10", ddp_backend=Choice.LEGACY)
    for name in [name for name in sys.modules if name.startswith("fairseq")]:
        monkeypatch.delitem(sys.modules, name)
    model, _ = load_fairseq(file, text="segmented")
    assert model.config["encoder_layers"] == 2
