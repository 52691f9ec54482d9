"""Explanations: the numbers of the mixture, shares that sum to 1, and the pairs they come from."""

import io
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from rich.console import Console

from lightning_knnmt.data import ParallelDataModule, collate
from lightning_knnmt.data.batch import Example
from lightning_knnmt.decoding import SoftmaxDistribution
from lightning_knnmt.explanation import (
    Explanation,
    Neighbour,
    Token,
    joined,
    place_in,
    spans_of,
)
from lightning_knnmt.explanation_view import view, words_of
from lightning_knnmt.models import Transformer
from lightning_knnmt.retrieval import Retrieval
from lightning_knnmt.translator import Translation, Translator


@pytest.fixture
def translations(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, toy_retrieval: Retrieval
) -> list[Translation]:
    translator = Translator(tiny_model, toy_datamodule.tokenizer, toy_retrieval)
    lines = toy_datamodule.test_corpus.source_lines()[:8]
    return list(translator.translate(lines, beam_size=2, explain=True))


def explanation_of(translation: Translation) -> Explanation:
    assert translation.explanation is not None
    return translation.explanation


def test_the_shares_of_the_model_and_the_neighbours_sum_to_one(
    translations: list[Translation],
) -> None:
    tokens = [token for each in translations for token in explanation_of(each).tokens]
    for token in tokens:
        shares = [neighbour.share for neighbour in token.neighbours]
        assert token.nmt_share + sum(shares) == pytest.approx(1.0, abs=1e-5)
        mixed = (1 - token.knn_weight) * token.nmt_prob + token.knn_weight * token.knn_prob
        assert token.prob == pytest.approx(mixed, abs=1e-6)
        distances = [neighbour.distance for neighbour in token.neighbours]
        assert len(distances) == 4
        assert distances == sorted(distances)
    assert any(token.knn_share > 0.1 for token in tokens)


def test_a_token_names_what_the_model_alone_would_have_chosen(
    translations: list[Translation], tiny_model: Transformer, toy_datamodule: ParallelDataModule
) -> None:
    tokenizer = toy_datamodule.tokenizer
    vocabulary = tokenizer.vocabulary
    changed = 0
    for translation in translations:
        tokens = explanation_of(translation).tokens
        (source,) = tokenizer.encode_source([translation.source])
        (target,) = tokenizer.encode_target([translation.text])
        if len(target) != len(tokens):  # the text has another tokenization
            continue
        read = torch.tensor([[vocabulary.start_id, *target[:-1]]])
        with torch.inference_mode():
            states = tiny_model.eval()(torch.tensor([source]), read)
            logits = tiny_model.output_projection(states.hidden)[0]
            logits[:, list(vocabulary.never_emitted)] = -torch.inf
        for each, best, emitted in zip(tokens, logits.argmax(-1).tolist(), target, strict=True):
            expected = None if best == emitted else tokenizer.decode([best])
            assert each.instead_of == expected
            changed += expected is not None
    assert changed


def test_tokens_say_what_decoding_computed(
    translations: list[Translation],
) -> None:
    for translation in translations:
        tokens = explanation_of(translation).tokens
        log_prob = sum(torch.tensor(token.prob).log() for token in tokens)
        assert float(log_prob) / len(tokens) == pytest.approx(translation.score, abs=1e-3)
        assert tokens[-1].token == ""  # the end of the sentence
        spans = [token.span for token in tokens]
        assert "".join(translation.text[slice(*span)] for span in spans) == translation.text


def test_neighbours_come_from_where_they_say(
    translations: list[Translation], toy_retrieval: Retrieval, toy_datamodule: ParallelDataModule
) -> None:
    datastore, corpus = toy_retrieval.datastore, toy_datamodule.train_corpus
    sources, targets = corpus.source_lines(), corpus.target_lines()
    decode = toy_datamodule.tokenizer.decode
    marked = 0
    for translation in translations:
        explanation = explanation_of(translation)
        for neighbour in (n for token in explanation.tokens for n in token.neighbours):
            source, target = explanation.pairs[neighbour.sentence]
            assert (source, target) == (sources[neighbour.sentence], targets[neighbour.sentence])
            value = int(datastore.values[neighbour.entry])
            assert neighbour.token == decode([value])
            assert neighbour.span is not None
            assert target[slice(*neighbour.span)] == neighbour.token
            marked += bool(neighbour.token)
    assert marked > 10


def test_without_retrieval_the_model_decides_all(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule
) -> None:
    tokenizer = toy_datamodule.tokenizer
    (translation,) = Translator(tiny_model, tokenizer).translate(["bade goto"], explain=True)
    explanation = explanation_of(translation)
    assert explanation.pairs == {}
    for token in explanation.tokens:
        assert (token.nmt_share, token.knn_weight, token.neighbours) == (1.0, 0.0, ())
        assert token.prob == token.nmt_prob


def test_an_empty_line_has_an_empty_explanation(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule
) -> None:
    (translation,) = Translator(tiny_model, toy_datamodule.tokenizer).translate([""], explain=True)
    assert translation.explanation == Explanation("", (), {})


def test_the_parts_of_a_long_line_are_explained_as_one(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, toy_retrieval: Retrieval
) -> None:
    tokenizer = toy_datamodule.tokenizer
    line = " ".join(toy_datamodule.test_corpus.source_lines()[:3])
    translator = Translator(tiny_model, tokenizer, toy_retrieval, max_source_length=12)
    (translation,) = translator.translate([line], explain=True)
    explanation = explanation_of(translation)
    assert explanation.text == translation.text
    assert sum(token.token == "" for token in explanation.tokens) > 1  # several ends
    for token in explanation.tokens:
        assert translation.text[slice(*token.span)].strip() == token.token.strip()
        assert all(neighbour.sentence in explanation.pairs for neighbour in token.neighbours)


def test_json_has_plain_types_only(translations: list[Translation]) -> None:
    explanation = explanation_of(translations[0])
    content = json.loads(json.dumps(explanation.to_dict()))
    assert len(content["tokens"]) == len(explanation.tokens)
    token = content["tokens"][0]
    assert set(token) == {
        *("token", "span", "p", "p_nmt", "lambda", "p_knn", "nmt_share", "instead_of", "neighbours")
    }
    neighbour = token["neighbours"][0]
    assert set(neighbour) == {"entry", "sentence", "token", "distance", "share", "span"}
    pair = content["pairs"][str(neighbour["sentence"])]
    assert pair["target"] == explanation.pairs[neighbour["sentence"]][1]


def test_spans_cover_a_text_whatever_decoding_does(toy_datamodule: ParallelDataModule) -> None:
    tokenizer = toy_datamodule.tokenizer
    ids = tokenizer.encode_target(["bade ♥ goto"])[0]
    text, spans = spans_of(tokenizer, ids)
    assert len(spans) == len(ids)
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)
    assert all(a[1] == b[0] for a, b in pairwise(spans))


def test_a_place_is_found_beside_unknown_characters() -> None:
    assert place_in("a {name} b", "a ⁇ name ⁇  b", (4, 8)) == (3, 7)
    assert place_in("a {name} b", "a ⁇ name ⁇  b", (1, 3)) is None
    assert place_in("one two", "one two", (3, 7)) == (4, 7)


def token(
    text: str,
    place: int,
    knn_share: float = 0.0,
    *sentences: int,
    instead_of: str | None = None,
) -> Token:
    neighbours = tuple(
        Neighbour(0, each, text.strip(), 1.0, knn_share / len(sentences), (0, len(text.strip())))
        for each in sentences
    )
    span, values = (place, place + len(text)), (0.5, 0.25, 0.5, 0.5, 1 - knn_share)
    return Token(text, span, neighbours, *values, instead_of=instead_of)


def test_tokens_are_merged_into_words() -> None:
    made = Explanation(
        "skin types 2",
        (token("skin", 0), token(" ty", 4), token("pes", 7), token(" ", 10), token("2", 11)),
        {},
    )
    assert [word.text for word in words_of(made)] == ["skin", "types", "2"]
    assert [len(word.tokens) for word in words_of(made)] == [1, 2, 2]
    chinese = Explanation("今天好", (token("今天", 0), token("好", 2), token("", 3)), {})
    assert [word.text for word in words_of(chinese)] == ["今天", "好"]


def test_the_view_shows_what_retrieval_decided() -> None:
    made = Explanation(
        "Skin type two",
        (
            token("Skin", 0, 0.9, 7, instead_of="Hide"),
            token(" type", 4, 0.8, 7, instead_of="Type"),
            token(" two", 9, 0.9, 3),  # a large share, but the model would have said the same
        ),
        {7: ("Tipo de pele 1", "Skin 1"), 3: ("Dois", "Two")},
    )
    output = io.StringIO()
    Console(file=output, width=80).print(view("Tipo de pele 2", made))
    shown = output.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    table, pairs = shown.split("training text")
    assert "90 %" in next(line for line in table.splitlines() if line.startswith("Skin  "))
    assert "Skin type" in pairs  # two words that one pair decided
    assert "[Skin] 1" in pairs
    assert "Hide" in pairs
    assert "Two" not in pairs
    assert "two" not in pairs


def test_the_view_says_when_the_model_decided_all() -> None:
    made = Explanation("two", (token("two", 0, 0.2, 3),), {3: ("Dois", "Two")})
    output = io.StringIO()
    Console(file=output, width=80).print(view("dois", made))
    assert "Dois" not in output.getvalue()
    assert "model" in output.getvalue().splitlines()[-1]


def test_joined_parts_keep_their_places() -> None:
    parts = [
        Explanation("ab", (token("ab", 0), token("", 2)), {1: ("x", "y")}),
        Explanation("ab", (token("ab", 0), token("", 2)), {2: ("z", "w")}),
    ]
    whole = joined(parts, "ab ab")
    assert [each.span for each in whole.tokens] == [(0, 2), (2, 2), (3, 5), (5, 5)]
    assert set(whole.pairs) == {1, 2}


def test_a_target_prefix_is_not_explained(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = toy_datamodule.tokenizer
    prefixed = replace(tokenizer.vocabulary, target_prefix=(20,))
    monkeypatch.setattr(tokenizer, "vocabulary", prefixed)
    (translation,) = Translator(tiny_model, tokenizer).translate(["bade"], explain=True)
    (source,) = tokenizer.encode_source(["bade"])
    batch = collate([Example(0, source, [20])], prefixed)
    base = SoftmaxDistribution(tiny_model.output_projection, prefixed.never_emitted)
    with torch.inference_mode():
        states = tiny_model(batch.source_ids, batch.target_ids)
        log_prob, _ = base.top(states.select(0).select(slice(1, 2)), 1)  # after the prefix
    first = explanation_of(translation).tokens[0]
    assert first.prob == pytest.approx(float(log_prob.exp()), abs=1e-5)
