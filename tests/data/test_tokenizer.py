import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch

from lightning_knnmt.data import (
    SentencePieceTokenizer,
    TextError,
    TextPair,
    TokenizerError,
    Vocabulary,
    tokenizer_from_state,
)


def _marian_like_model(lines: list[str]) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=15,
        pad_id=-1,
        bos_id=-1,
        eos_id=0,
        unk_id=1,
        minloglevel=2,
    )
    return model.getvalue()


def test_text_survives_the_round_trip(tokenizer: SentencePieceTokenizer) -> None:
    lines = ["casa grande não é", "light door"]
    ids = tokenizer.encode_source(lines)
    assert [row[-1] for row in ids] == [tokenizer.vocabulary.eos_id] * 2
    assert tokenizer.vocabulary.start_id not in [*ids[0], *ids[1]]
    assert [tokenizer.decode(row) for row in ids] == lines
    assert tokenizer.encode_target(lines) == ids


def test_special_ids_are_silent(tokenizer: SentencePieceTokenizer) -> None:
    (ids,) = tokenizer.encode_source(["casa"])
    start, pad = tokenizer.vocabulary.start_id, tokenizer.vocabulary.pad_id
    assert tokenizer.decode([start, *ids, pad, pad]) == "casa"


def test_own_models_have_the_usual_special_ids(tokenizer: SentencePieceTokenizer) -> None:
    assert tokenizer.vocabulary == Vocabulary(size=40, pad_id=0, unk_id=1, start_id=2, eos_id=3)


def test_a_model_without_padding_gets_one_more_id() -> None:
    tokenizer = SentencePieceTokenizer(_marian_like_model(["a red house", "the large door"] * 9))
    size = tokenizer.vocabulary.size
    assert tokenizer.vocabulary == Vocabulary(
        size=size, pad_id=size - 1, start_id=size - 1, eos_id=0, unk_id=1
    )
    (ids,) = tokenizer.encode_source(["red door"])
    assert max(ids) < size - 1
    assert tokenizer.decode([size - 1, *ids, size - 1]) == "red door"


def test_state_passes_through_a_weights_only_checkpoint(
    tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    torch.save(tokenizer.state(), tmp_path / "state.pt")
    restored = tokenizer_from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert restored.digest == tokenizer.digest
    assert restored.vocabulary == tokenizer.vocabulary
    assert restored.encode_source(["casa"]) == tokenizer.encode_source(["casa"])


def test_an_unknown_kind_of_state_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"'moses'.*'sentencepiece'"):
        tokenizer_from_state({"kind": "moses"})


def test_it_travels_to_other_processes(tokenizer: SentencePieceTokenizer) -> None:
    assert pickle.loads(pickle.dumps(tokenizer)).digest == tokenizer.digest


def test_training_is_repeatable_and_cached(toy_root: Path, tmp_path: Path) -> None:
    files = [toy_root / "train.pt", toy_root / "train.en"]
    first = SentencePieceTokenizer.train(files, 40, cache_dir=tmp_path / "one")
    again = SentencePieceTokenizer.train(files, 40, cache_dir=tmp_path / "two")
    assert first.digest == again.digest
    (model,) = (tmp_path / "one" / "tokenizers").glob("*.model")
    made = model.stat().st_mtime_ns
    assert (
        SentencePieceTokenizer.train(files, 40, cache_dir=tmp_path / "one").digest == first.digest
    )
    assert model.stat().st_mtime_ns == made
    assert (
        SentencePieceTokenizer.train(files, 36, cache_dir=tmp_path / "one").digest != first.digest
    )


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (8000, r"\b8000\b.*train\.en.*vocab_size"),
        (8, r"\b8\b.*train\.en.*vocab_size"),
    ],
)
def test_a_vocabulary_that_does_not_fit_the_text(
    toy_root: Path, vocab_size: int, message: str
) -> None:
    files = [toy_root / "train.pt", toy_root / "train.en"]
    with pytest.raises(TokenizerError, match=message):
        SentencePieceTokenizer.train(files, vocab_size, cache_dir=toy_root)


def test_training_text_must_be_utf8(write_pair: Callable[..., TextPair], tmp_path: Path) -> None:
    text = write_pair(["uma casa", "uma porta"], ["a house", "a door"])
    text.target_path.write_bytes(b"a house\na d\xf6or\n")
    with pytest.raises(TextError, match=r"train\.en, line 2: byte 4 \(0xf6\)"):
        SentencePieceTokenizer.train([text.source_path, text.target_path], 20, cache_dir=tmp_path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.spm").write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match=r"bad\.spm"):
        SentencePieceTokenizer.from_file(tmp_path / "bad.spm")
    with pytest.raises(TokenizerError, match=r"none\.spm"):
        SentencePieceTokenizer.from_file(tmp_path / "none.spm")
