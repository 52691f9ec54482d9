"""The Marian reader on tiny synthetic files: a writer, an independent forward pass, and damage."""

import io
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import yaml

from lightning_knnmt.decoding import SoftmaxDistribution
from lightning_knnmt.models import DecoderStates, Transformer
from lightning_knnmt.pretrained import MarianError, load_marian

DIM, FFN, HEADS, PIECES = 8, 12, 2, 40
FLOAT32, INT8, TEXT = 0x404, 0x4101, 0x101
CONFIG: dict[str, Any] = {
    "type": "transformer",
    "dec-cell": "ssru",
    "transformer-decoder-autoreg": "rnn",
    "tied-embeddings-all": True,
    "transformer-preprocess": "",
    "transformer-postprocess": "dan",
    "transformer-postprocess-top": "",
    "transformer-train-position-embeddings": False,
    "transformer-no-projection": False,
    "transformer-ffn-depth": 2,
    "transformer-ffn-activation": "relu",
    "transformer-tied-layers": [],
    "transformer-heads": HEADS,
    "output-omit-bias": False,
    "right-left": False,
    "input-types": [],
    "lemma-dim-emb": 0,
    "ulr": False,
    "enc-depth": 2,
    "dec-depth": 1,
}
Arrays = dict[str, np.ndarray]


def random_arrays() -> Arrays:
    """Weights in Marian's layout: matrices [inputs, outputs], vectors [1, d]."""
    rng = np.random.default_rng(0)
    arrays: Arrays = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        arrays[name] = rng.normal(0, 0.5, (rows, columns)).astype(np.float32)

    def attention(prefix: str) -> None:
        for each in "qkvo":
            matrix(f"{prefix}_W{each}", DIM, DIM)
            matrix(f"{prefix}_b{each}", 1, DIM)
        norm(f"{prefix}_Wo")

    def norm(prefix: str) -> None:
        matrix(f"{prefix}_ln_scale", 1, DIM)
        matrix(f"{prefix}_ln_bias", 1, DIM)

    def ffn(prefix: str) -> None:
        matrix(f"{prefix}_ffn_W1", DIM, FFN)
        matrix(f"{prefix}_ffn_b1", 1, FFN)
        matrix(f"{prefix}_ffn_W2", FFN, DIM)
        matrix(f"{prefix}_ffn_b2", 1, DIM)
        norm(f"{prefix}_ffn_ffn")

    matrix("Wemb", PIECES, DIM)
    matrix("decoder_ff_logit_out_b", 1, PIECES)
    for i in (1, 2):
        attention(f"encoder_l{i}_self")
        ffn(f"encoder_l{i}")
    for name in ("rnn_W", "rnn_Wf"):
        matrix(f"decoder_l1_{name}", DIM, DIM)
    matrix("decoder_l1_rnn_bf", 1, DIM)
    norm("decoder_l1_rnn_ffn")
    attention("decoder_l1_context")
    ffn("decoder_l1")
    return arrays


def item_bytes(name: str, array: np.ndarray, *, quantized: bool) -> tuple[int, bytes]:
    """Type and data of an item, padded to 256 bytes as Marian does."""
    if not quantized:
        data = array.tobytes()
        return FLOAT32, data + bytes(-len(data) % 256)
    multiplier = np.float32(127 / np.abs(array).max())
    integers = np.rint(array * multiplier).astype(np.int8)
    stored = integers if name.endswith("Wemb") else np.ascontiguousarray(integers.T)
    data = stored.tobytes() + struct.pack("<f", multiplier)
    return INT8, data + bytes(-len(data) % 256)


def marian_bytes(
    arrays: Arrays, config: dict[str, Any] = CONFIG, *, quantized: bool = True, version: int = 1
) -> bytes:
    items = []
    for name, array in arrays.items():
        is_matrix = quantized and len(array) > 1
        type_, data = item_bytes(name, array, quantized=is_matrix)
        items.append((name, type_, array.shape, data))
    text = yaml.safe_dump(config).encode() + b"\0"
    items.append(("special:model.yml", TEXT, (len(text),), text))
    out = io.BytesIO()
    out.write(struct.pack("<QQ", version, len(items)))
    for name, type_, shape, data in items:
        out.write(struct.pack("<4Q", len(name) + 1, type_, len(shape), len(data)))
    for name, *_ in items:
        out.write(name.encode() + b"\0")
    for _, _, shape, _ in items:
        out.write(struct.pack(f"<{len(shape)}i", *shape))
    padding = -(out.tell() + 8) % 256
    out.write(struct.pack("<Q", padding) + bytes(padding))
    for *_, data in items:
        out.write(data)
    return out.getvalue()


def train_vocabulary(lines: list[str], size: int) -> bytes:
    """A SentencePiece model as Marian's: EOS 0, unknown 1, neither start nor padding."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines * 9),
        model_writer=model,
        vocab_size=size,
        eos_id=0,
        unk_id=1,
        bos_id=-1,
        pad_id=-1,
        hard_vocab_limit=False,
        model_type="bpe",
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def vocabulary() -> bytes:
    return train_vocabulary(["uma casa azul", "a casa da praia", "um dia de sol azul"], PIECES)


@pytest.fixture
def directory(tmp_path: Path, vocabulary: bytes) -> Path:
    (tmp_path / "vocab.xxyy.spm").write_bytes(vocabulary)
    (tmp_path / "model.xxyy.intgemm.alphas.bin").write_bytes(marian_bytes(random_arrays()))
    return tmp_path


def damage(directory: Path, change: Callable[[bytes], bytes]) -> Path:
    path = directory / "model.xxyy.intgemm.alphas.bin"
    path.write_bytes(change(path.read_bytes()))
    return path


def rewrite(directory: Path, data: bytes) -> Path:
    return damage(directory, lambda _: data)


# An independent forward pass, in float64 and NumPy, written from the data's description.


def reference_hidden(arrays: Arrays, source: list[int], target: list[int]) -> np.ndarray:
    """Hidden states for the decoder inputs zero, then target: [len(target) + 1, DIM]."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}

    def positions(length: int) -> np.ndarray:
        rates = np.exp(-np.arange(DIM // 2) * np.log(10000) / (DIM // 2 - 1))
        angles = np.arange(length)[:, None] * rates
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    def add_and_norm(x: np.ndarray, branch: np.ndarray, prefix: str) -> np.ndarray:
        y = x + branch
        centred = y - y.mean(-1, keepdims=True)
        y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return y * w[f"{prefix}_ln_scale"] + w[f"{prefix}_ln_bias"]

    def attend(x: np.ndarray, states: np.ndarray, prefix: str) -> np.ndarray:
        q = x @ w[f"{prefix}_Wq"] + w[f"{prefix}_bq"]
        k = states @ w[f"{prefix}_Wk"] + w[f"{prefix}_bk"]
        v = states @ w[f"{prefix}_Wv"] + w[f"{prefix}_bv"]
        heads = []
        for part in np.split(np.arange(DIM), HEADS):
            weights = np.exp(q[:, part] @ k[:, part].T / np.sqrt(DIM / HEADS))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
        return np.concatenate(heads, axis=1) @ w[f"{prefix}_Wo"] + w[f"{prefix}_bo"]

    def ffn(x: np.ndarray, prefix: str) -> np.ndarray:
        inner = np.maximum(x @ w[f"{prefix}_ffn_W1"] + w[f"{prefix}_ffn_b1"], 0)
        branch = inner @ w[f"{prefix}_ffn_W2"] + w[f"{prefix}_ffn_b2"]
        return add_and_norm(x, branch, f"{prefix}_ffn_ffn")

    def ssru(x: np.ndarray) -> np.ndarray:
        c, outputs = np.zeros(DIM), []
        for row in x:
            f = 1 / (1 + np.exp(-(row @ w["decoder_l1_rnn_Wf"] + w["decoder_l1_rnn_bf"][0])))
            c = f * c + (1 - f) * (row @ w["decoder_l1_rnn_W"])
            outputs.append(np.maximum(c, 0))
        return np.stack(outputs)

    states = w["Wemb"][source] * np.sqrt(DIM) + positions(len(source))
    for i in (1, 2):
        prefix = f"encoder_l{i}"
        branch = attend(states, states, f"{prefix}_self")
        states = ffn(add_and_norm(states, branch, f"{prefix}_self_Wo"), prefix)
    embedded = np.concatenate([np.zeros((1, DIM)), w["Wemb"][target] * np.sqrt(DIM)])
    x = embedded + positions(len(target) + 1)
    x = add_and_norm(x, ssru(x), "decoder_l1_rnn_ffn")
    x = add_and_norm(x, attend(x, states, "decoder_l1_context"), "decoder_l1_context_Wo")
    return ffn(x, "decoder_l1")


SOURCE, TARGET = [5, 9, 17, 4, 0], [7, 22, 8]


def hidden_of(model: Transformer, target: Sequence[int] = TARGET) -> torch.Tensor:
    with torch.inference_mode():
        states = model(torch.tensor([SOURCE + [PIECES] * 2]), torch.tensor([[PIECES, *target]]))
    return states.hidden[0]


def log_probs_of(model: Transformer, hidden: torch.Tensor) -> torch.Tensor:
    return SoftmaxDistribution(model.output_projection)(DecoderStates(hidden, hidden))


def test_float_weights_give_the_reference_hidden_states(directory: Path) -> None:
    arrays = random_arrays()
    rewrite(directory, marian_bytes(arrays, quantized=False))
    model, _ = load_marian(directory)
    expected = torch.from_numpy(reference_hidden(arrays, SOURCE, TARGET)).float()
    torch.testing.assert_close(hidden_of(model), expected, rtol=1e-4, atol=1e-4)
    model.train()  # fine-tuning goes on without dropout, as the students were trained
    torch.testing.assert_close(hidden_of(model), expected, rtol=1e-4, atol=1e-4)


def test_int8_weights_give_those_of_the_rounded_weights(directory: Path) -> None:
    arrays = random_arrays()
    rounded = {}
    for name, array in arrays.items():
        multiplier = np.float32(127 / np.abs(array).max())
        rounded[name] = np.rint(array * multiplier) / multiplier if len(array) > 1 else array
    model, _ = load_marian(directory)
    expected = torch.from_numpy(reference_hidden(rounded, SOURCE, TARGET)).float()
    torch.testing.assert_close(hidden_of(model), expected, rtol=1e-4, atol=1e-4)


def test_vocabulary_gets_a_padding_that_is_zero_and_never_produced(directory: Path) -> None:
    model, tokenizer = load_marian(directory)
    assert tokenizer.vocabulary.pad_id == tokenizer.vocabulary.start_id == PIECES
    assert tokenizer.vocabulary.size == model.config["vocab_size"] == PIECES + 1
    assert (model.pad_id, model.start_id, model.eos_id) == (PIECES, PIECES, 0)
    assert not model.source_embedding.weight[PIECES].any()
    log_probs = log_probs_of(model, 10 * torch.randn(50, DIM))
    assert (log_probs[:, PIECES].exp() == 0).all()


def test_the_models_own_path_serves_as_well_as_its_directory(directory: Path) -> None:
    by_directory, _ = load_marian(directory)
    by_path, _ = load_marian(directory / "model.xxyy.intgemm.alphas.bin")
    assert torch.equal(hidden_of(by_directory), hidden_of(by_path))
    assert not by_path.training


def test_a_file_cut_anywhere_is_refused_with_its_name_and_place(directory: Path) -> None:
    whole = marian_bytes(random_arrays())
    header = struct.unpack_from("<QQ", whole)[1] * 32 + 16
    for end in (0, 9, 16, 100, header, header + 50, header + 1500, len(whole) // 2, len(whole) - 1):
        path = rewrite(directory, whole[:end])
        with pytest.raises(MarianError, match=r"damaged.* at byte [\d,]+\b") as error:
            load_marian(path)
        assert str(path) in str(error.value)


def test_another_version_is_refused(directory: Path) -> None:
    path = rewrite(directory, marian_bytes(random_arrays(), version=7))
    with pytest.raises(MarianError, match=re.escape(str(path))):
        load_marian(path)


@pytest.mark.parametrize("place", [8, 16, 32, 40, 16 + 32 * 5, 40 + 32 * 5])
@pytest.mark.parametrize("size", [2**31, 2**45, 2**64 - 1])
def test_wild_sizes_are_refused_without_claiming_memory(
    directory: Path, place: int, size: int
) -> None:
    """The number of items; lengths of names, ranks and numbers of bytes."""
    whole = marian_bytes(random_arrays())
    path = rewrite(directory, whole[:place] + struct.pack("<Q", size) + whole[place + 8 :])
    with pytest.raises(MarianError, match="damaged"):
        load_marian(path)


@pytest.mark.parametrize("shape", [(2**30, 2**30), (-4, -10), (0, 8), (41, 8)])
def test_a_shape_beyond_its_data_is_refused(directory: Path, shape: tuple[int, int]) -> None:
    whole = marian_bytes(random_arrays(), quantized=False)
    place = whole.index(struct.pack("<2i", PIECES, DIM))
    path = rewrite(directory, whole[:place] + struct.pack("<2i", *shape) + whole[place + 8 :])
    with pytest.raises(MarianError, match=r"Wemb, at byte [\d,]+, .*shape|do not belong together"):
        load_marian(path)


@pytest.mark.parametrize("name", ["Wemb", "encoder_l2_self_Wk", "decoder_l1_ffn_b2"])
def test_a_missing_tensor_is_named(directory: Path, name: str) -> None:
    arrays = random_arrays()
    del arrays[name]
    path = rewrite(directory, marian_bytes(arrays))
    with pytest.raises(MarianError, match=re.escape(f"{path} lacks {name}")):
        load_marian(path)


def test_weights_that_do_not_fit_together_are_named(directory: Path) -> None:
    arrays = random_arrays()
    arrays["decoder_l1_rnn_bf"] = arrays["decoder_l1_rnn_bf"][:, :-1]
    path = rewrite(directory, marian_bytes(arrays))
    with pytest.raises(MarianError, match=r"decoder_layers\.0\.cell\.forget_bias .*shape"):
        load_marian(path)
    arrays = random_arrays()
    arrays["encoder_l1_self_Wk"] = arrays["encoder_l1_self_Wk"][:-1]
    path = rewrite(directory, marian_bytes(arrays))
    with pytest.raises(MarianError, match=r"encoder_l1_self_Wq, at byte .*encoder_l1_self_Wk"):
        load_marian(path)


def test_numbers_that_cannot_be_weights_are_refused(directory: Path) -> None:
    arrays = random_arrays()
    arrays["encoder_l1_self_bo"][0, 2] = np.nan
    path = rewrite(directory, marian_bytes(arrays))
    with pytest.raises(MarianError, match=r"encoder_l1_self_bo, .*finite"):
        load_marian(path)
    whole = marian_bytes(random_arrays())
    _, data = item_bytes("Wemb", random_arrays()["Wemb"], quantized=True)
    place = whole.index(data) + PIECES * DIM
    rewrite(directory, whole[:place] + struct.pack("<f", -1.0) + whole[place + 4 :])
    with pytest.raises(MarianError, match=r"Wemb, .*-1\.0\b"):
        load_marian(path)


def test_other_architectures_are_refused_with_what_is_supported(directory: Path) -> None:
    for name, value in {
        "type": "s2s",
        "transformer-decoder-autoreg": "self-attention",
        "tied-embeddings-all": False,
    }.items():
        path = rewrite(directory, marian_bytes(random_arrays(), CONFIG | {name: value}))
        with pytest.raises(MarianError, match=re.escape(f"{name}: {value!r}")) as error:
            load_marian(path)
        assert "supported are Bergamot" in str(error.value)
    rewrite(
        directory, marian_bytes(random_arrays(), CONFIG | {"transformer-ffn-activation": "tanh"})
    )
    with pytest.raises(MarianError, match=r"ffn-activation: 'tanh'.*relu, swish, gelu"):
        load_marian(path)


@pytest.mark.parametrize("value", [0, -1, "many", 10**12, None, True])
def test_impossible_depths_are_refused(directory: Path, value: object) -> None:
    path = rewrite(directory, marian_bytes(random_arrays(), CONFIG | {"enc-depth": value}))
    with pytest.raises(MarianError, match=r"enc-depth: |lacks encoder_l3_self"):
        load_marian(path)


def test_heads_that_do_not_divide_the_width_are_refused(directory: Path) -> None:
    path = rewrite(directory, marian_bytes(random_arrays(), CONFIG | {"transformer-heads": 3}))
    with pytest.raises(MarianError, match=r"\b3 heads .*\b8 dimensions"):
        load_marian(path)


def test_a_configuration_that_is_no_yaml_is_refused(directory: Path) -> None:
    text = yaml.safe_dump(CONFIG).encode()
    path = damage(directory, lambda whole: whole.replace(text, b"{" * len(text)))
    with pytest.raises(MarianError, match=r"at byte [\d,]+, .*YAML"):
        load_marian(path)
    path = rewrite(
        directory, marian_bytes(random_arrays()).replace(b"special:model", b"special:MODEL")
    )
    with pytest.raises(MarianError, match=r"special:model.yml"):
        load_marian(path)


def test_another_type_of_numbers_is_refused(directory: Path) -> None:
    path = damage(
        directory, lambda whole: whole.replace(struct.pack("<Q", INT8), struct.pack("<Q", 0x4201))
    )
    with pytest.raises(MarianError, match=r"Wemb .*0x4201.*float32"):
        load_marian(path)


def test_a_vocabulary_of_another_model_is_refused(directory: Path) -> None:
    arrays = random_arrays()
    arrays["Wemb"] = arrays["Wemb"][:-1]
    rewrite(directory, marian_bytes(arrays))
    with pytest.raises(MarianError, match=r"\b39 embeddings.*\b40 pieces"):
        load_marian(directory)


def test_files_that_are_missing_or_too_many_are_named(directory: Path) -> None:
    (directory / "vocab.xxyy.spm").rename(directory / "vocab.other.spm")
    load_marian(directory)  # the only one there is
    (directory / "vocab.another.spm").write_bytes(b"")
    with pytest.raises(MarianError, match=r"vocab\.xxyy\.spm.*vocab\.another\.spm"):
        load_marian(directory)
    (directory / "srcvocab.xxyy.spm").write_bytes(b"")
    with pytest.raises(MarianError, match=r"trgvocab\.xxyy\.spm.* holds srcvocab\.xxyy\.spm"):
        load_marian(directory)
    (directory / "model.second.bin").write_bytes(b"")
    with pytest.raises(MarianError, match=r"\b2 files model\.\*\.bin"):
        load_marian(directory)


class TestTwoVocabularies:
    """As in Firefox's models into Chinese, Japanese and Korean."""

    LINES = ("海辺の家", "青い家", "青い空の日", "家の日")

    @pytest.fixture
    def target_vocabulary(self) -> bytes:
        return train_vocabulary(list(self.LINES), 24)

    @pytest.fixture
    def two(self, directory: Path, target_vocabulary: bytes) -> Path:
        """A folder with both vocabularies, of 40 and 24 pieces, and a matrix for each."""
        (directory / "vocab.xxyy.spm").rename(directory / "srcvocab.xxyy.spm")
        (directory / "trgvocab.xxyy.spm").write_bytes(target_vocabulary)
        rewrite(directory, marian_bytes(self.arrays(24), self.UNTIED))
        return directory

    UNTIED = CONFIG | {"tied-embeddings-all": False, "tied-embeddings": True}

    @staticmethod
    def arrays(target_pieces: int) -> Arrays:
        arrays = random_arrays()
        arrays["encoder_Wemb"] = arrays.pop("Wemb")
        arrays["decoder_Wemb"] = arrays["encoder_Wemb"][::-1][:target_pieces].copy()
        bias = arrays["decoder_ff_logit_out_b"]
        arrays["decoder_ff_logit_out_b"] = bias[:, :target_pieces].copy()
        return arrays

    @pytest.mark.parametrize("quantized", [False, True])
    def test_each_side_has_its_own_matrix(self, two: Path, *, quantized: bool) -> None:
        arrays = self.arrays(24)
        rewrite(two, marian_bytes(arrays, self.UNTIED, quantized=quantized))
        model, _ = load_marian(two)
        source, target = (arrays[f"{side}_Wemb"] for side in ("encoder", "decoder"))
        for ours, theirs in (
            (model.source_embedding, source),
            (model.target_embedding, target),
            (model.output_projection, target),
        ):
            largest = np.abs(theirs).max()
            torch.testing.assert_close(
                ours.weight[: len(theirs)],
                torch.from_numpy(theirs),
                rtol=0,
                atol=largest / 254 + 1e-6 if quantized else 0,
            )
            assert not ours.weight[len(theirs) :].any()
            assert len(ours.weight) == PIECES + 1
        assert model.output_projection.weight is model.target_embedding.weight

    def test_ids_and_text_are_each_sides_own(self, two: Path) -> None:
        model, tokenizer = load_marian(two)
        vocabulary = tokenizer.vocabulary
        sides = [
            sentencepiece.SentencePieceProcessor(model_file=str(two / f"{side}vocab.xxyy.spm"))
            for side in ("src", "trg")
        ]
        assert (vocabulary.size, vocabulary.source_size) == (PIECES + 1, PIECES + 1)
        assert (vocabulary.pad_id, vocabulary.start_id) == (PIECES, PIECES)
        assert (vocabulary.eos_id, vocabulary.unk_id) == (0, 1)
        (source,) = tokenizer.encode_source(["uma casa da praia"])
        assert source == sides[0].encode("uma casa da praia", add_eos=True)
        for line in self.LINES:
            (target,) = tokenizer.encode_target([line])
            assert target == sides[1].encode(line, add_eos=True)
            assert tokenizer.decode(target) == line
        log_probs = log_probs_of(model, 10 * torch.randn(50, DIM))
        assert (log_probs[:, 24:].exp() == 0).all()

    def test_a_decoder_reads_targets_where_the_reference_does(self, two: Path) -> None:
        """The forward pass of one matrix, whose rows are exchanged on the target's side."""
        arrays = random_arrays()
        rewrite(two, marian_bytes(self.arrays(PIECES), self.UNTIED, quantized=False))
        (two / "trgvocab.xxyy.spm").write_bytes((two / "srcvocab.xxyy.spm").read_bytes())
        model, _ = load_marian(two)
        mirrored = [PIECES - 1 - token for token in TARGET]
        expected = torch.from_numpy(reference_hidden(arrays, SOURCE, TARGET)).float()
        torch.testing.assert_close(hidden_of(model, mirrored), expected, rtol=1e-4, atol=1e-4)

    def test_they_may_share_one_matrix(self, directory: Path, vocabulary: bytes) -> None:
        (directory / "vocab.xxyy.spm").unlink()
        for side, lines in (("src", "uma casa azul"), ("trg", "a casa da praia azul")):
            spm = vocabulary if side == "src" else train_vocabulary([lines, "um dia de sol"], 40)
            (directory / f"{side}vocab.xxyy.spm").write_bytes(spm)
        model, tokenizer = load_marian(directory)
        assert model.source_embedding.weight is model.target_embedding.weight
        assert tokenizer.encode_source(["um dia de sol"]) != tokenizer.encode_target(
            ["um dia de sol"]
        )
        assert tokenizer.vocabulary.source_size is not None  # its ids are not the target's

    def test_files_that_do_not_belong_together(self, two: Path) -> None:
        rewrite(two, marian_bytes(self.arrays(23), self.UNTIED))
        with pytest.raises(MarianError, match=r"23 embeddings.*trgvocab\.xxyy\.spm.* 24 "):
            load_marian(two)
        (two / "trgvocab.xxyy.spm").write_bytes(b"no model")
        with pytest.raises(MarianError, match=r"trgvocab\.xxyy\.spm"):
            load_marian(two)
