"""Hugging Face directories, written by hand: what is wrong with them is said, and what is right.

tests/parity/test_huggingface.py holds the witnesses of what the weights mean.
"""

import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_knnmt.data import PieceTokenizer, tokenizer_from_state
from lightning_knnmt.pretrained import (
    HuggingFaceError,
    Pretrained,
    load_huggingface_model,
    load_pretrained,
)

DIM, FFN = 8, 12
LINES = ["uma casa azul", "a casa da praia", "um dia de sol azul"]
CONFIGS: dict[str, dict[str, Any]] = {
    "marian": {
        "architectures": ["MarianMTModel"],
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "bad_words_ids": [[0]],
    },
    "fsmt": {},
    "m2m_100": {},
}


def trained_model(**ids: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(LINES * 9),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        model_type="bpe",
        minloglevel=2,
        **ids,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def spm() -> bytes:
    """As in M2M-100 and NLLB: <unk> 0, <s> 1, </s> 2."""
    return trained_model()


def pieces_of(spm: bytes) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(spm)
    return [processor.IdToPiece(i) for i in range(3, processor.GetPieceSize())]


def random_weights(vocab_size: int, *, final_norm: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    weights = {"model.shared.weight": torch.randn(vocab_size, DIM)}

    def linear(name: str, outputs: int, inputs: int) -> None:
        weights[f"{name}.weight"] = torch.randn(outputs, inputs)
        weights[f"{name}.bias"] = torch.randn(outputs)

    def norm(name: str) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.ones(DIM), torch.zeros(DIM)

    for side in ("encoder", "decoder"):
        layer = f"model.{side}.layers.0"
        for attention in ("self_attn", "encoder_attn")[: 1 + (side == "decoder")]:
            for each in ("q", "k", "v", "out"):
                linear(f"{layer}.{attention}.{each}_proj", DIM, DIM)
            norm(f"{layer}.{attention}_layer_norm")
        linear(f"{layer}.fc1", FFN, DIM)
        linear(f"{layer}.fc2", DIM, FFN)
        norm(f"{layer}.final_layer_norm")
        if final_norm:
            norm(f"model.{side}.layer_norm")
    return weights


def write_model(directory: Path, family: str, vocab_size: int) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": family,
        "d_model": DIM,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_position_embeddings": 32,
        **CONFIGS[family],
    }
    (directory / "config.json").write_text(json.dumps(config))
    weights = random_weights(vocab_size, final_norm=family == "m2m_100")
    save_file(weights, directory / "model.safetensors")
    return directory


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def opus(tmp_path: Path, spm: bytes) -> Path:
    """One pair of languages."""
    names = ["<pad>", "</s>", "<unk>", *pieces_of(spm)]
    directory = write_model(tmp_path / "opus", "marian", len(names))
    (directory / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (directory / "source.spm").write_bytes(spm)
    (directory / "target.spm").write_bytes(spm)
    return directory


@pytest.fixture
def m2m(tmp_path: Path, spm: bytes) -> Path:
    """A hundred languages after the pieces, and eight ids that mean nothing."""
    names = ["<s>", "<pad>", "</s>", "<unk>", *pieces_of(spm)]
    directory = write_model(tmp_path / "m2m", "m2m_100", len(names) + 108)
    (directory / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (directory / "sentencepiece.bpe.model").write_bytes(spm)
    return directory


@pytest.fixture
def nllb(tmp_path: Path, spm: bytes) -> Path:
    size = len(pieces_of(spm)) + 3
    directory = write_model(tmp_path / "nllb", "m2m_100", size + 1 + 3)
    (directory / "sentencepiece.bpe.model").write_bytes(spm)
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "NllbTokenizer"}')
    codes = ["deu_Latn", "por_Latn", "<mask>"]
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"additional_special_tokens": codes})
    )
    return directory


def translate(pretrained: Pretrained) -> Tensor:
    ids = pretrained.tokenizer.encode_source(["um dia de sol"])
    start = torch.full((1, 1), pretrained.tokenizer.vocabulary.start_id)
    with torch.no_grad():
        hidden: Tensor = pretrained.model(torch.tensor(ids), start).hidden
    return hidden


def test_one_pair_of_languages(opus: Path) -> None:
    pretrained = load_pretrained(opus)
    tokenizer = pretrained.tokenizer
    assert not pretrained.model.training
    assert tokenizer.vocabulary.target_prefix == ()
    ids = tokenizer.encode_source(["a casa", "a z€"])
    assert ids[0][-1] == ids[1][-1] == 1
    assert 2 in ids[1], "an unknown piece"
    assert tokenizer.decode(tokenizer.encode_target(["a casa da praia"])[0]) == "a casa da praia"
    assert pretrained.model.output_projection.bias[0] == -1e4, "padding is never generated"
    assert translate(pretrained).isfinite().all()


def test_a_language_token_begins_the_source_of_a_multilingual_opus_model(opus: Path) -> None:
    vocabulary = json.loads((opus / "vocab.json").read_text())
    del vocabulary["▁praia"]
    vocabulary[">>fra<<"] = free = min(set(range(99)) - set(vocabulary.values()))
    (opus / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = load_pretrained(opus, target_lang="fra").tokenizer
    assert tokenizer.encode_source(["a casa"])[0][0] == free
    assert tokenizer.encode_target(["a casa"])[0][0] != free
    with pytest.raises(HuggingFaceError, match=r"target_lang.*fra"):
        load_pretrained(opus)


def test_languages_begin_source_and_target(m2m: Path, nllb: Path, spm: bytes) -> None:
    first = len(pieces_of(spm)) + 4
    cases = [
        (m2m, "pt", "de", first + 71, first + 16),
        (nllb, "por_Latn", "deu_Latn", first + 1, first),
    ]
    for directory, source, target, source_id, target_id in cases:
        pretrained = load_pretrained(directory, source_lang=source, target_lang=target)
        tokenizer = pretrained.tokenizer
        (source_ids,), (target_ids,) = (
            encode(["a casa azul"]) for encode in (tokenizer.encode_source, tokenizer.encode_target)
        )
        assert source_ids[0] == source_id
        assert target_ids[0] == target_id
        assert source_ids[1:] == target_ids[1:]
        assert source_ids[-1] == tokenizer.vocabulary.eos_id == 2
        assert tokenizer.vocabulary.target_prefix == (target_id,)
        assert tokenizer.decode([*target_ids, source_id]) == "a casa azul"
        assert translate(pretrained).isfinite().all()


def test_the_tokenizer_travels(opus: Path, m2m: Path, tmp_path: Path) -> None:
    originals = [
        load_pretrained(opus).tokenizer,
        load_pretrained(m2m, source_lang="pt", target_lang="de").tokenizer,
        load_pretrained(m2m, source_lang="pt", target_lang="en").tokenizer,
    ]
    for original in originals:
        torch.save(original.state(), tmp_path / "state.pt")
        restored = tokenizer_from_state(torch.load(tmp_path / "state.pt", weights_only=True))
        for copy in (restored, pickle.loads(pickle.dumps(original))):
            assert isinstance(copy, PieceTokenizer)
            assert copy.digest == original.digest
            assert copy.vocabulary == original.vocabulary
            assert copy.encode_source(LINES) == original.encode_source(LINES)
            assert copy.encode_target(LINES) == original.encode_target(LINES)
    assert len({original.digest for original in originals}) == 3


def test_half_precision_becomes_float32(opus: Path) -> None:
    path = opus / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    assert {p.dtype for p in load_huggingface_model(opus).parameters()} == {torch.float32}


def shard(directory: Path) -> Path:
    """The weights in two files and an index."""
    whole = directory / "model.safetensors"
    weights = load_file(whole)
    whole.unlink()
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def test_shards_are_one_model(opus: Path) -> None:
    whole = load_huggingface_model(opus).state_dict()
    shard(opus)
    for name, tensor in load_huggingface_model(opus).state_dict().items():
        assert torch.equal(tensor, whole[name])


def drop_shard(directory: Path) -> None:
    shard(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()


def swap_shard(directory: Path) -> None:
    shard(directory)
    save_file({"else": torch.zeros(1)}, directory / "model-00002-of-00002.safetensors")


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_of(content: Any) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        torch.save(content, directory / "pytorch_model.bin")

    return write


def change_weights(**changes: Tensor | None) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        path = directory / "model.safetensors"
        weights = {**load_file(path), **changes}
        save_file({name: t for name, t in weights.items() if t is not None}, path)

    return write


def change_config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: change_json(directory / "config.json", **changes)


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def write_text(name: str, text: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text(text) and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            change_config(model_type="bart", architectures=["BartModel"]),
            r"'bart'.*BartModel.*marian .*fsmt .*m2m_100 ",
        ),
        (change_config(d_model="8"), r"d_model: '8'"),
        (
            change_config(decoder_attention_heads=4),
            r"\b2 encoder_attention_heads and 4 decoder_attention_heads",
        ),
        (
            change_config(activation_function="tanh"),
            r"activation_function: 'tanh'.*relu, gelu, swish, silu",
        ),
        (change_config(pad_token_id=9999), r"pad_id 9999\b"),
        (write_text("config.json", "{"), r"config\.json .*JSON"),
        (remove("model.safetensors"), r"model\.safetensors or pytorch_model\.bin"),
        (drop_shard, r"model-00002-of-00002\.safetensors"),
        (swap_shard, r"model-00002-of-00002\.safetensors holds model\."),
        (truncate, r"model\.safetensors is damaged"),
        (
            change_config(encoder_layers=2),
            r"lack model\.encoder\.layers\.1\.self_attn\.q_proj\.weight\b.*config\.json",
        ),
        (
            change_weights(**{"model.encoder.adapter.weight": torch.zeros(2)}),
            r"\b1 tensors\b.*model\.encoder\.adapter\.weight",
        ),
        (
            change_weights(**{"model.decoder.layers.0.fc2.bias": torch.zeros(3)}),
            r"decoder_layers\.0\.ffn\.down\.bias .*\[3\].*\[8\]",
        ),
        (pickle_of([1, 2]), r"pytorch_model\.bin .*tensors"),
        (remove("vocab.json"), r"vocab\.json"),
        (remove("source.spm"), r"source\.spm"),
        (write_text("target.spm", "?"), r"\b1 bytes .*SentencePiece"),
        (
            write_text("vocab.json", '{"</s>": 0, "<unk>": 500}'),
            r"vocab\.json .*\b500\b",
        ),
        (write_text("vocab.json", '{"</s>": "0"}'), r"vocab\.json .*id\b"),
        (write_text("vocab.json", '{"</s>": 0}'), "source.*<unk>"),
    ],
)
def test_damage_is_told(opus: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(opus)
    with pytest.raises(HuggingFaceError, match=message) as error:
        load_pretrained(opus)
    assert str(opus) in str(error.value)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_runs_nothing(opus: Path, tmp_path: Path) -> None:
    proof = tmp_path / "it ran"
    pickle_of({"model.shared.weight": Malicious(proof)})(opus)
    with pytest.raises(HuggingFaceError, match="Nothing was run"):
        load_pretrained(opus)
    assert not proof.exists()


def test_truncated_pickle(opus: Path) -> None:
    pickle_of(load_file(opus / "model.safetensors"))(opus)
    path = opus / "pytorch_model.bin"
    assert load_pretrained(opus).model is not None
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(HuggingFaceError, match=r"pytorch_model\.bin .*damaged"):
        load_pretrained(opus)


def test_languages_that_a_model_does_not_know(opus: Path, m2m: Path, nllb: Path) -> None:
    cases: list[tuple[Path, dict[str, str], str]] = [
        (
            m2m,
            {"source_lang": "pt", "target_lang": "xx"},
            r"target language 'xx'.*\bam, ar\b",
        ),
        (m2m, {"source_lang": "pt"}, r"target_lang.*\baf, am, ar\b"),
        (nllb, {"source_lang": "pt", "target_lang": "deu_Latn"}, "source language 'pt'"),
        (opus, {"target_lang": "de"}, r"target_lang \(de\)"),
        (opus, {"source_lang": "pt"}, r"source_lang \(pt\)"),
    ]
    for directory, languages, message in cases:
        with pytest.raises(HuggingFaceError, match=message):
            load_pretrained(directory, **languages)


def test_a_tokenizer_file_that_is_absent_is_named(
    opus: Path, m2m: Path, nllb: Path, tmp_path: Path
) -> None:
    pytest.importorskip("sacremoses")
    fsmt = write_fsmt(tmp_path / "fsmt")
    codes = {m2m: ("pt", "de"), nllb: ("por_Latn", "deu_Latn")}
    for directory, names in {
        opus: ("source.spm", "target.spm", "vocab.json"),
        m2m: ("sentencepiece.bpe.model", "vocab.json"),
        nllb: ("sentencepiece.bpe.model", "tokenizer_config.json"),
        fsmt: ("vocab-src.json", "vocab-tgt.json", "merges.txt"),
    }.items():
        languages = dict(
            zip(("source_lang", "target_lang"), codes.get(directory, ()), strict=False)
        )
        for name in names:
            path = directory / name
            content = path.read_bytes()
            path.unlink()
            with pytest.raises(HuggingFaceError, match=re.escape(name)) as error:
                load_pretrained(directory, **languages)
            assert str(directory) in str(error.value)
            path.write_bytes(content)
        load_pretrained(directory, **languages)  # they were all that it lacked


def test_what_a_tokenizer_lacks_or_asks_for(m2m: Path, nllb: Path, tmp_path: Path) -> None:
    german = {"source_lang": "por_Latn", "target_lang": "deu_Latn"}
    change_json(nllb / "tokenizer_config.json", legacy_behaviour=True)
    with pytest.raises(HuggingFaceError, match="legacy_behaviour"):
        load_pretrained(nllb, **german)
    change_json(nllb / "tokenizer_config.json", legacy_behaviour=False)
    (nllb / "special_tokens_map.json").unlink()
    with pytest.raises(HuggingFaceError, match=r"special_tokens_map\.json"):
        load_pretrained(nllb, **german)
    (m2m / "tokenizer_config.json").write_text('{"language_codes": "other"}')
    with pytest.raises(HuggingFaceError, match=r"language_codes: 'other'.*m2m100"):
        load_pretrained(m2m, source_lang="pt", target_lang="de")


def write_fsmt(directory: Path) -> Path:
    """A joint vocabulary of 11, and merges with counts, as fastBPE wrote them."""
    pieces = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "die</w>",
        ".</w>",
        "Tür",
        "en</w>",
        "s",
        "dass</w>",
        "madeupword0000</w>",
    ]
    table = {piece: i for i, piece in enumerate(pieces)}
    write_model(directory, "fsmt", len(table))
    change_json(directory / "config.json", langs=["de", "en"])
    for name in ("vocab-src.json", "vocab-tgt.json"):
        (directory / name).write_text(json.dumps(table))
    merges = [
        "d i 9",
        "di e</w> 8",
        "T ü 5",
        "Tü r 4",
        "e n</w> 4",
        "d a 3",
        "da s 3",
        "das s</w> 2",
    ]
    (directory / "merges.txt").write_text("\n".join([*merges, ""]))
    return directory


def test_fsmt_tokenizes_with_moses_and_bpe(tmp_path: Path) -> None:
    pytest.importorskip("sacremoses")
    model, tokenizer = load_pretrained(write_fsmt(tmp_path))
    assert model.config["position_offset"] == 2
    (ids,) = tokenizer.encode_source(["die Türen, dass."])
    assert ids == [4, 6, 7, 3, 9, 5, 2]
    assert tokenizer.decode([4, 6, 7, 9, 5, 2]) == "die Türen dass."
    again = tokenizer_from_state(tokenizer.state())
    assert again.encode_source(["die Türen"]) == [[4, 6, 7, 2]]
    assert again.digest == tokenizer.digest


def test_what_fsmts_tokenizer_lacks(tmp_path: Path) -> None:
    pytest.importorskip("sacremoses")
    fsmt = write_fsmt(tmp_path)
    with pytest.raises(HuggingFaceError, match=r"source_lang \(de\)"):
        load_pretrained(fsmt, source_lang="de")
    (fsmt / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    with pytest.raises(HuggingFaceError, match="do_lower_case"):
        load_pretrained(fsmt)
    (fsmt / "tokenizer_config.json").unlink()
    table = json.loads((fsmt / "vocab-tgt.json").read_text())
    for changes, message in (
        ({"neu</w>": 11}, r"vocab-tgt\.json .*\b12\b.*\b11\b"),
        ({"die</w>": 5}, r"vocab-tgt\.json.*\b0 to 10\b"),
        ({"<s>": 1, "<pad>": 0}, "<s> <pad> </s> <unk>"),
    ):
        (fsmt / "vocab-tgt.json").write_text(json.dumps(table | changes))
        with pytest.raises(HuggingFaceError, match=message):
            load_pretrained(fsmt)
    change_json(fsmt / "config.json", langs=None)
    with pytest.raises(HuggingFaceError, match="langs is None"):
        load_pretrained(fsmt)
    change_json(fsmt / "config.json", langs=["de", "en"])
    (fsmt / "merges.txt").unlink()
    with pytest.raises(HuggingFaceError, match=r"merges\.txt"):
        load_pretrained(fsmt)
