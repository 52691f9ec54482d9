"""The Translator: one line in, one line out, whatever the line; results as the search's own."""

import itertools
import logging
import random
from collections.abc import Iterator

import pytest
import torch

from lightning_knnmt.data import ParallelDataModule, Tokenizer
from lightning_knnmt.decoding import BeamSearch, SoftmaxDistribution, translate_batches
from lightning_knnmt.models import Transformer
from lightning_knnmt.retrieval import Retrieval
from lightning_knnmt.translator import (
    Translation,
    Translator,
    join_parts,
    split_line,
    windows_of,
)

# An untrained model would go on and on.
SHORT = BeamSearch(beam_size=1, max_length_ratio=1.0, max_length_offset=2)
ODD = "\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\x00\t\u200b\ufeff\u00a0♥🙂。ü"


@pytest.fixture
def tokenizer(toy_datamodule: ParallelDataModule) -> Tokenizer:
    return toy_datamodule.tokenizer


@pytest.fixture
def sources(toy_datamodule: ParallelDataModule) -> list[str]:
    return toy_datamodule.test_corpus.source_lines()


def odd_lines(sources: list[str], count: int) -> list[str]:
    """Lines of words and of characters that programs trip over, some of nothing else."""
    rng = random.Random(7)

    def line() -> str:
        words = rng.choices([*rng.choice(sources).split(), *ODD], k=rng.randint(0, 12))
        return rng.choice(["", " ", "  "]).join(words) if rng.random() < 0.9 else ""

    return [line() for _ in range(count)]


def test_every_line_becomes_one_line_and_the_one_it_becomes_alone(
    tiny_model: Transformer, tokenizer: Tokenizer, sources: list[str]
) -> None:
    lines = odd_lines(sources, 60)
    translator = Translator(tiny_model, tokenizer, search=SHORT, window=7)
    together = list(translator.translate(iter(lines)))
    assert [each.source for each in together] == lines
    for line, translation in zip(lines, together, strict=True):
        assert len(translation.text.splitlines()) <= 1
        assert translation.text == next(translator.translate([line])).text
        if not line.strip():
            assert translation.text == ""
    assert sum(bool(each.text) for each in together) > 30


def test_neither_batches_nor_windows_change_a_translation(
    tiny_model: Transformer, tokenizer: Tokenizer, sources: list[str]
) -> None:
    def texts(**settings: int) -> list[str]:
        translator = Translator(tiny_model, tokenizer, search=SHORT, **settings)
        return [each.text for each in translator.translate(sources[:20], beam_size=3)]

    expected = texts()
    assert texts(max_tokens=1) == texts(max_tokens=60, window=11) == texts(window=1) == expected


@pytest.mark.parametrize("with_retrieval", [False, True])
def test_translations_are_those_of_the_search(
    tiny_model: Transformer,
    toy_datamodule: ParallelDataModule,
    toy_retrieval: Retrieval,
    with_retrieval: bool,
) -> None:
    tokenizer, search = toy_datamodule.tokenizer, BeamSearch(beam_size=4)
    base = SoftmaxDistribution(tiny_model.output_projection, tokenizer.vocabulary.never_emitted)
    distribution = toy_retrieval.distribution(base) if with_retrieval else base
    batches = toy_datamodule.test_dataloader()
    expected = dict(
        translate_batches(tiny_model, tokenizer.vocabulary, batches, search, distribution)
    )
    translator = Translator(tiny_model, tokenizer, toy_retrieval if with_retrieval else None)
    lines = toy_datamodule.test_corpus.source_lines()
    for row, translation in enumerate(translator.translate(lines, beam_size=4, nbest=3)):
        best = expected[row][:3]
        assert [each.text for each in translation.alternatives] == [
            tokenizer.decode(hypothesis.tokens) for hypothesis in best
        ]
        scores = [each.score for each in translation.alternatives]
        assert scores == pytest.approx([each.normalized_score for each in best], abs=1e-5)
        assert scores == sorted(scores, reverse=True)
        assert (translation.text, translation.score) == translation.alternatives[0]


def test_a_line_that_says_nothing_is_never_sent_to_the_model(
    tiny_model: Transformer,
    tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: torch.Tensor) -> None:
        raise AssertionError("the model was asked")

    monkeypatch.setattr(tiny_model, "encode", refuse)
    lines = ["", "   ", "\u2028", "\x0c\x85", "♥", "♥ 🙂"]
    translations = list(Translator(tiny_model, tokenizer).translate(lines))
    assert [(each.text, each.score) for each in translations] == [("", 0.0)] * len(lines)
    # Blank lines are nothing to speak of, but these two held something.
    assert [message.split()[1] for message in caplog.messages] == ["5", "6"]


def test_a_long_line_is_translated_in_parts_and_named(
    tiny_model: Transformer,
    tokenizer: Tokenizer,
    sources: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = 12
    seen: list[int] = []
    encode = tiny_model.encode

    def watched(source_ids: torch.Tensor) -> object:
        seen.append(source_ids.shape[1])
        return encode(source_ids)

    monkeypatch.setattr(tiny_model, "encode", watched)
    translator = Translator(tiny_model, tokenizer, max_source_length=limit, window=2)
    short = "bade goto"
    with caplog.at_level(logging.WARNING):
        translations = list(translator.translate([short, short, " ".join(sources[:5]), short]))
    assert len(translations) == 4
    assert max(seen) <= limit
    (message,) = caplog.messages
    assert message.startswith("Line 3 ")
    long = translations[2]
    parts = split_line(
        " ".join(sources[:5]), lambda text: len(tokenizer.encode_source([text])[0]) <= limit
    )
    alone = list(translator.translate(parts))
    assert long.text == join_parts([each.text for each in alone])
    assert long.score == pytest.approx(sum(each.score for each in alone) / len(alone))


def test_alternatives_of_a_line_in_parts_are_sorted(
    tiny_model: Transformer, tokenizer: Tokenizer, sources: list[str]
) -> None:
    translator = Translator(tiny_model, tokenizer, max_source_length=12)
    (translation,) = translator.translate([" ".join(sources[:3])], beam_size=4, nbest=4)
    scores = [each.score for each in translation.alternatives]
    assert len(scores) == 4
    assert scores == sorted(scores, reverse=True)
    greedy = list(translator.translate([" ".join(sources[:3])], beam_size=4))
    assert translation.text == greedy[0].text


def test_endless_input_is_read_no_further_than_a_window(
    tiny_model: Transformer, tokenizer: Tokenizer, sources: list[str]
) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        for line in itertools.cycle(sources):
            read += 1
            yield line

    translations = Translator(tiny_model, tokenizer, window=100).translate(endless())
    for count, _ in enumerate(itertools.islice(translations, 250), start=1):
        assert count <= read < count + 100


def test_windows_grow_and_hold_a_bounded_number_of_characters() -> None:
    lines = [str(i) for i in range(1000)]
    windows = list(windows_of(lines, 256))
    assert list(itertools.chain(*windows)) == lines
    assert [len(window) for window in windows] == [64, 128, 256, 256, 256, 40]
    assert [len(window) for window in windows_of(["x" * (3 << 20)] * 5, 256)] == [2, 2, 1]


def test_what_cannot_be_translated_is_said(tiny_model: Transformer, tokenizer: Tokenizer) -> None:
    translator = Translator(tiny_model, tokenizer, search=BeamSearch(beam_size=2))
    with pytest.raises(ValueError, match=r"nbest is 3.*beam_size"):
        translator.translate(["bade"], nbest=3)
    with pytest.raises(ValueError, match="beam_size"):
        translator.translate(["bade"], beam_size=0)
    with pytest.raises(ValueError, match=r"\[line\]"):
        translator.translate("bade goto")
    with pytest.raises(ValueError, match=r"Line 2, character 3 is U\+D800"):
        list(translator.translate(["bade", "ba\ud800de"]))
    with pytest.raises(ValueError, match="max_source_length"):
        Translator(tiny_model, tokenizer, max_source_length=0)


def test_retrieval_for_other_weights_is_rejected(
    tiny_model: Transformer, tokenizer: Tokenizer, toy_retrieval: Retrieval
) -> None:
    with torch.no_grad():
        tiny_model.source_embedding.weight += 1.0
    with pytest.raises(ValueError, match="other weights"):
        Translator(tiny_model, tokenizer, toy_retrieval)


def test_retrieval_takes_part(
    tiny_model: Transformer, tokenizer: Tokenizer, toy_retrieval: Retrieval, sources: list[str]
) -> None:
    def texts(retrieval: Retrieval | None) -> list[str]:
        translator = Translator(tiny_model, tokenizer, retrieval)
        return [each.text for each in translator.translate(sources)]

    assert texts(toy_retrieval) != texts(None)


# ------------------------------------------------------------------- cutting long lines


def fits(text: str) -> bool:
    return len(text) <= 24


def test_a_line_is_cut_at_sentence_ends_first() -> None:
    text = "One is here. Two, is it? “Three!” Four by Dr. A. Smith."
    assert split_line(text, fits) == [
        "One is here.",
        "Two, is it?",
        "“Three!”",
        "Four by Dr. A. Smith.",
    ]
    assert split_line("今天天气很好。" * 4, fits) == ["今天天气很好。"] * 4


def test_a_long_sentence_is_cut_at_a_clause_then_between_words_then_anywhere() -> None:
    assert split_line("when it is late, then we all go home", fits) == [
        "when it is late,",
        "then we all go home",
    ]
    assert split_line("all of us will be going home now", fits) == [
        "all of us will",
        "be going home now",
    ]
    assert split_line("x" * 50, fits) == ["x" * 12, "x" * 13, "x" * 12, "x" * 13]


@pytest.mark.parametrize("seed", range(20))
def test_cutting_loses_nothing_but_white_space(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices("abc. ,;!?。、 \u3000ü\u2028", k=rng.randint(1, 400)))
    parts = split_line(text, fits)
    assert all(fits(part) for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())


def test_parts_are_joined_as_their_script_is() -> None:
    assert join_parts(["One.", "", "Two."]) == "One. Two."
    assert join_parts(["今天。", "明天。"]) == "今天。明天。"
    assert join_parts(["a\u2028b", "c\n"]).splitlines() == ["a b c "]
    assert join_parts([]) == ""


def test_a_translation_of_nothing_has_one_empty_alternative(
    tiny_model: Transformer, tokenizer: Tokenizer
) -> None:
    (translation,) = Translator(tiny_model, tokenizer).translate([""], beam_size=3, nbest=3)
    assert translation == Translation("", "", 0.0, (("", 0.0),))  # type: ignore[arg-type]
