"""Text on fairseq's way: Moses, BPE, dictionaries."""

import builtins
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_knnmt.data import FairseqTokenizer, TokenizerError, Vocabulary, tokenizer_from_state
from lightning_knnmt.data.fairseq.dictionary import SPECIALS, FairseqDictionary
from lightning_knnmt.data.fairseq.tokenizer import (
    BytePairEncoding,
    Moses,
    Side,
    dictionary_of_table,
)

CODES = BytePairEncoding([("e", "i"), ("ei", "n</w>"), ("s", "e")])
GERMAN = FairseqDictionary((*SPECIALS, "ein", "se@@", "e", "."))
ENGLISH = FairseqDictionary((*SPECIALS, "a", "se@@"))


def test_segmented_text_is_looked_up() -> None:
    tokenizer = FairseqTokenizer(Side(GERMAN), Side(ENGLISH))
    assert tokenizer.text == "segmented"
    assert tokenizer.encode_source(["ein se@@ e", " neu  . "]) == [[4, 5, 6, 2], [3, 7, 2]]
    assert tokenizer.encode_target(["a se@@"]) == [[4, 5, 2]]
    assert tokenizer.decode([2, 4, 5, 3, 1, 2]) == "a se@@ <unk>"
    assert tokenizer.vocabulary == Vocabulary(
        size=6, pad_id=1, start_id=2, eos_id=2, unk_id=3, source_size=8
    )
    shared = FairseqTokenizer(Side(GERMAN), Side(GERMAN))
    assert (shared.vocabulary.size, shared.vocabulary.source_size) == (8, None)


def test_tokenized_text_is_cut() -> None:
    tokenizer = FairseqTokenizer(Side(GERMAN, CODES), Side(GERMAN, CODES))
    assert tokenizer.text == "tokenized"
    assert tokenizer.encode_source(["ein see ."]) == [[4, 5, 6, 7, 2]]
    assert tokenizer.decode([4, 5, 6, 7, 2]) == "ein see ."


def raw() -> FairseqTokenizer:
    return FairseqTokenizer(
        Side(GERMAN, CODES, Moses("de")),
        Side(GERMAN, CODES, Moses("en", replace_unicode_punctuation=True)),
    )


def test_raw_text_goes_through_moses_and_comes_back() -> None:
    pytest.importorskip("sacremoses")
    tokenizer = raw()
    assert tokenizer.text == "raw"
    assert tokenizer.encode_source(["ein see."]) == [[4, 5, 6, 7, 2]]
    assert tokenizer.decode([4, 5, 6, 7, 2]) == "ein see."


def test_moses_normalizes_separates_and_escapes() -> None:
    """The words that Moses' own scripts make of these, by their rules."""
    pytest.importorskip("sacremoses")
    line = "Das „alte“ Haus (z.B. A-B) kostet\u200b 3.50 & <mehr>, isn't  it? [x|y]"
    words = Moses("en").tokenize(line)
    assert " ".join(words) == (
        "Das &quot; alte &quot; Haus ( z.B. A @-@ B ) kostet 3.50 &amp; &lt; mehr &gt; , isn "
        "&apos;t it ? &#91; x &#124; y &#93;"
    )
    plain = 'Das "alte" Haus (z.B. A-B) kostet 3.50 & < mehr >, isn\'t it? [x | y]'
    assert Moses("en").detokenize(words) == plain
    assert Moses("en").tokenize("：") == ["："]
    assert Moses("en", replace_unicode_punctuation=True).tokenize("：") == [":"]


def test_without_sacremoses_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    imports = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "sacremoses":
            raise ImportError("No module named 'sacremoses'")
        return imports(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TokenizerError, match=r"pip install sacremoses.*tokenized"):
        Moses("de")


def test_moses_needs_codes() -> None:
    pytest.importorskip("sacremoses")
    with pytest.raises(TokenizerError, match="codes"):
        FairseqTokenizer(Side(GERMAN, None, Moses("de")), Side(GERMAN))


def test_state_passes_through_a_weights_only_checkpoint_and_to_other_processes(
    tmp_path: Path,
) -> None:
    pytest.importorskip("sacremoses")
    tokenizers = [
        raw(),
        FairseqTokenizer(Side(GERMAN, CODES), Side(ENGLISH, CODES)),
        FairseqTokenizer(Side(GERMAN), Side(ENGLISH)),
    ]
    assert len({tokenizer.digest for tokenizer in tokenizers}) == 3
    for tokenizer in tokenizers:
        torch.save(tokenizer.state(), tmp_path / "state.pt")
        restored = tokenizer_from_state(torch.load(tmp_path / "state.pt", weights_only=True))
        for again in (restored, pickle.loads(pickle.dumps(tokenizer))):
            assert again.digest == tokenizer.digest
            assert again.vocabulary == tokenizer.vocabulary
            assert again.encode_source(["ein se@@ e."]) == tokenizer.encode_source(["ein se@@ e."])
            assert again.decode([4, 5, 3]) == tokenizer.decode([4, 5, 3])


def test_hugging_faces_table_has_its_marks_at_other_places() -> None:
    table = {"ein</w>": 4, "se": 5, ".</w>": 6} | {name: i for i, name in enumerate(SPECIALS)}
    assert dictionary_of_table(table).symbols == (*SPECIALS, "ein", "se@@", ".")
    for wrong in (table | {"ein</w>": 5}, table | {"ein</w>": 7}, table | {"<s>": 1, "<pad>": 0}):
        with pytest.raises(TokenizerError, match=r"0 to 6.*<s> <pad> </s> <unk>"):
            dictionary_of_table(wrong)
