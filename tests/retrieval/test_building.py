"""Datastores built from text: every stored token in its row, and only of the model at hand."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_knnmt.data import Corpus, ParallelDataModule, Tokenizer, Vocabulary, encode_corpus
from lightning_knnmt.data.text import find_text_pair
from lightning_knnmt.models import Transformer
from lightning_knnmt.retrieval import (
    Datastore,
    DatastorePlan,
    EntryRows,
    StaleDatastoreError,
    building,
    ensure_datastore,
    fingerprint,
)
from lightning_knnmt.retrieval.building import check_buildable
from lightning_knnmt.retrieval.errors import MissingDatastoreError

ODD_LINES = [  # of the target; all but the first have something that the vocabulary lacks
    "badox bedex",
    "ba\u2028do {x} ßü",
    "dade\x0bfix\x0c \x85lax",
    "{}{}",
    "tekax € {badox}",
]


@pytest.fixture
def odd_corpus(toy_datamodule: ParallelDataModule, tmp_path: Path) -> Corpus:
    """A text whose lines hold unknown characters, and some that end a line elsewhere."""
    folder = tmp_path / "odd"
    folder.mkdir()
    sources = [f"dabe\u2028 {number} ő" for number in range(len(ODD_LINES))]
    for lang, lines in (("xx", sources), ("yy", ODD_LINES)):
        content = "".join(f"{line}\n" for line in lines)
        (folder / f"text.{lang}").write_text(content, encoding="utf-8", newline="\n")
    text = find_text_pair(folder / "text", "xx", "yy")
    return encode_corpus(text, toy_datamodule.tokenizer, tmp_path / "cache")


class TestEntryRows:
    VOCABULARIES = (
        Vocabulary(12, pad_id=9, start_id=9, eos_id=0, unk_id=1),
        Vocabulary(12, pad_id=0, start_id=2, eos_id=3, unk_id=1),
        Vocabulary(12, pad_id=1, start_id=2, eos_id=2, unk_id=3),
    )

    @pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=["marian", "ours", "fairseq"])
    @pytest.mark.parametrize("seed", range(5))
    def test_rows_are_those_of_a_loop(self, vocabulary: Vocabulary, seed: int) -> None:
        rng = np.random.default_rng(seed)
        targets = [
            [*rng.integers(0, 12, rng.integers(0, 9)).tolist(), vocabulary.eos_id]
            for _ in range(30)
        ]
        expected: dict[tuple[int, int], int] = {}
        offsets = []
        for sentence, target in enumerate(targets):
            offsets.append(len(expected))
            for place, token in enumerate(target):
                if token not in vocabulary.never_emitted:
                    expected[sentence, place] = len(expected)
        found = EntryRows.of(corpus_of(targets), SimpleNamespace(vocabulary=vocabulary))  # type: ignore[arg-type]
        assert found.offsets.tolist() == [*offsets, len(expected)]
        assert found.num_entries == len(expected) < found.num_tokens
        assert found.num_tokens == sum(map(len, targets))
        seen = []
        for batch in np.array_split(rng.permutation(30), rng.integers(1, 9)):
            tokens = [(i, place) for i in batch.tolist() for place in range(len(targets[i]))]
            sentences = np.array([i for i, _ in tokens])
            stored, rows = found.rows(sentences, np.array([targets[i][j] for i, j in tokens]))
            assert stored.tolist() == [token in expected for token in tokens]
            assert rows.tolist() == [expected[token] for token in tokens if token in expected]
            seen += rows.tolist()
        assert sorted(seen) == list(range(len(expected)))

    def test_nothing_is_left_out_where_all_may_be_emitted(self) -> None:
        targets = [[5, 6, 3], [3], [7, 7, 7, 3]]
        rows = EntryRows.of(corpus_of(targets), SimpleNamespace(vocabulary=self.VOCABULARIES[1]))  # type: ignore[arg-type]
        assert rows.offsets.tolist() == [0, 3, 4, 8]
        stored, places = rows.rows(np.array([2, 2, 2, 2, 0, 0, 0]), np.array([7, 7, 7, 3, 5, 6, 3]))
        assert stored.all()
        assert places.tolist() == [4, 5, 6, 7, 0, 1, 2]


def corpus_of(targets: list[list[int]]) -> Any:
    class Targets:
        target_tokens = np.concatenate([np.array(target, dtype=np.uint16) for target in targets])
        target_offsets = np.cumsum([0, *map(len, targets)])

        def __len__(self) -> int:
            return len(targets)

    return Targets()


@pytest.mark.parametrize("key_layer", ["opl_input", "ffn_input"])
@pytest.mark.parametrize("max_tokens", [60, 4096])
def test_every_entry_is_its_token_with_the_states_before_it(
    tiny_model: Transformer,
    toy_datamodule: ParallelDataModule,
    odd_corpus: Corpus,
    tmp_path: Path,
    key_layer: Any,
    max_tokens: int,
) -> None:
    vocabulary = toy_datamodule.tokenizer.vocabulary
    tiny_model.train()  # dropout stays out of the keys all the same
    plan = DatastorePlan(tmp_path, key_layer=key_layer, max_tokens=max_tokens)
    store = ensure_datastore(tiny_model, toy_datamodule.tokenizer, odd_corpus, plan)
    assert tiny_model.training
    tiny_model.eval()
    keys, values, sentences = [], [], []
    for i in range(len(odd_corpus)):
        source, target = (torch.tensor(side.astype("int64")) for side in odd_corpus[i])
        read = torch.cat([torch.tensor([vocabulary.start_id]), target[:-1]])
        with torch.no_grad():
            states = tiny_model(source[None], read[None]).of(key_layer)[0]
        for state, token in zip(states, target.tolist(), strict=True):
            if token not in (vocabulary.unk_id, vocabulary.pad_id, vocabulary.start_id):
                keys.append(state)
                values.append(token)
                sentences.append(i)
    assert store.values.tolist() == values
    np.testing.assert_allclose(store.keys, torch.stack(keys).half().numpy(), rtol=2e-3, atol=1e-4)
    assert store.sentences_of(np.arange(len(store))).tolist() == sentences
    assert store.manifest.num_tokens_left_out == len(odd_corpus.target_tokens) - len(values) > 5
    assert [store.pair(i) for i in range(len(odd_corpus))] == [
        (f"dabe\u2028 {i} ő", line) for i, line in enumerate(ODD_LINES)
    ]


def test_how_much_was_left_out_is_said(
    tiny_model: Transformer,
    toy_datamodule: ParallelDataModule,
    odd_corpus: Corpus,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        store = ensure_datastore(
            tiny_model, toy_datamodule.tokenizer, odd_corpus, DatastorePlan(tmp_path)
        )
    share = store.manifest.num_tokens_left_out / len(odd_corpus.target_tokens)
    assert f"{share:.2%}" in caplog.text
    assert str(store.directory) in caplog.text


@pytest.fixture
def tokenizer(toy_datamodule: ParallelDataModule) -> Tokenizer:
    return toy_datamodule.tokenizer


@pytest.fixture
def text(toy_datamodule: ParallelDataModule) -> Corpus:
    return toy_datamodule.valid_corpus


@pytest.fixture
def plan(tmp_path: Path) -> DatastorePlan:
    return DatastorePlan(tmp_path / "datastores", tmp_path / "given")


@pytest.fixture
def given(
    tiny_model: Transformer, tokenizer: Tokenizer, text: Corpus, plan: DatastorePlan
) -> Datastore:
    return ensure_datastore(tiny_model, tokenizer, text, plan)


def no_build(*_: Any) -> Datastore:
    raise AssertionError("nothing was to be built")


asks = pytest.mark.parametrize("ask", [ensure_datastore, check_buildable])
Ask = Callable[..., Any]


class TestOtherText:
    @asks
    def test_it_is_rejected_unless_allowed(
        self,
        ask: Ask,
        given: Datastore,
        tiny_model: Transformer,
        tokenizer: Tokenizer,
        odd_corpus: Corpus,
        plan: DatastorePlan,
    ) -> None:
        with pytest.raises(StaleDatastoreError, match=r"other_text=rebuild.*other_text=use") as e:
            ask(tiny_model, tokenizer, odd_corpus, plan)
        for part in (str(given.directory), given.manifest.corpus_digest[:12], odd_corpus.name):
            assert part in str(e.value)
        assert Datastore.open(given.directory).manifest == given.manifest

    def test_it_can_be_used_as_it_is(
        self,
        given: Datastore,
        tiny_model: Transformer,
        tokenizer: Tokenizer,
        odd_corpus: Corpus,
        plan: DatastorePlan,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        plan = dataclasses.replace(plan, other_text="use")
        check_buildable(tiny_model, tokenizer, odd_corpus, plan)
        used = ensure_datastore(tiny_model, tokenizer, odd_corpus, plan)
        assert used.manifest == given.manifest
        assert "other_text" in caplog.text

    def test_it_can_be_replaced(
        self,
        given: Datastore,
        tiny_model: Transformer,
        tokenizer: Tokenizer,
        odd_corpus: Corpus,
        plan: DatastorePlan,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        plan = dataclasses.replace(plan, other_text="rebuild")
        check_buildable(tiny_model, tokenizer, odd_corpus, plan)
        assert Datastore.open(given.directory).manifest == given.manifest, "only asked"
        rebuilt = ensure_datastore(tiny_model, tokenizer, odd_corpus, plan)
        assert rebuilt.directory == given.directory
        assert rebuilt.manifest.corpus_digest == odd_corpus.digest
        monkeypatch.setattr(building, "build", no_build)  # once is enough
        again = ensure_datastore(tiny_model, tokenizer, odd_corpus, plan)
        assert again.manifest == rebuilt.manifest

    @pytest.mark.parametrize("other_text", ["reject", "use", "rebuild"])
    @pytest.mark.parametrize("without_text", [False, True])
    def test_the_same_text_or_none_is_no_other_text(
        self,
        other_text: Any,
        without_text: bool,
        given: Datastore,
        tiny_model: Transformer,
        tokenizer: Tokenizer,
        text: Corpus,
        plan: DatastorePlan,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(building, "build", no_build)
        plan = dataclasses.replace(plan, other_text=other_text)
        arguments = (tiny_model, tokenizer, None if without_text else text, plan)
        check_buildable(*arguments)
        assert ensure_datastore(*arguments).manifest == given.manifest


class TestNotOurs:
    """Keys of another model, layer or tokenizer are rejected, whatever the text."""

    @asks
    @pytest.mark.parametrize("other_text", ["reject", "use"])
    def test_another_model(
        self,
        ask: Ask,
        other_text: Any,
        given: Datastore,
        tiny_model: Transformer,
        tokenizer: Tokenizer,
        text: Corpus,
        plan: DatastorePlan,
    ) -> None:
        with torch.no_grad():
            tiny_model.decoder_layers[0].ffn.up.bias += 0.1
        plan = dataclasses.replace(plan, other_text=other_text)
        for corpus in (text, None):
            with pytest.raises(StaleDatastoreError, match=fingerprint(tiny_model)) as e:
                ask(tiny_model, tokenizer, corpus, plan)
            assert given.manifest.model_fingerprint in str(e.value)

    @asks
    def test_another_layer(
        self,
        ask: Ask,
        given: Datastore,
        tiny_model: Transformer,
        tokenizer: Tokenizer,
        text: Corpus,
        plan: DatastorePlan,
    ) -> None:
        plan = dataclasses.replace(plan, key_layer="ffn_input")
        with pytest.raises(StaleDatastoreError, match=r"ffn_input.*knn\.key_layer=opl_input"):
            ask(tiny_model, tokenizer, text, plan)
        assert Datastore.open(given.directory).manifest == given.manifest

    @asks
    def test_another_tokenizer(
        self,
        ask: Ask,
        given: Datastore,
        tiny_model: Transformer,
        tokenizer: Tokenizer,
        plan: DatastorePlan,
    ) -> None:
        other: Any = SimpleNamespace(digest="of another one", vocabulary=tokenizer.vocabulary)
        with pytest.raises(StaleDatastoreError, match="of another one") as e:
            ask(tiny_model, other, None, plan)
        assert given.manifest.tokenizer_digest in str(e.value)

    def test_a_model_that_will_be_trained_first_may_be_another(
        self,
        given: Datastore,
        tiny_model: Transformer,
        tokenizer: Tokenizer,
        text: Corpus,
        plan: DatastorePlan,
    ) -> None:
        with torch.no_grad():
            tiny_model.decoder_layers[0].ffn.up.bias += 0.1
        check_buildable(tiny_model, tokenizer, text, plan, keys_change=True)
        assert Datastore.open(given.directory).manifest == given.manifest


class TestWithoutText:
    @asks
    def test_nothing_to_build_from_and_nothing_there(
        self, ask: Ask, tiny_model: Transformer, tokenizer: Tokenizer, plan: DatastorePlan
    ) -> None:
        with pytest.raises(MissingDatastoreError, match=r"knn\.directory") as e:
            ask(tiny_model, tokenizer, None, plan)
        assert str(plan.directory) in str(e.value)
        with pytest.raises(MissingDatastoreError, match=r"knn\.directory"):
            ask(tiny_model, tokenizer, None, dataclasses.replace(plan, directory=None))
        assert not plan.datastores.exists()


def test_each_text_model_and_precision_has_a_datastore_of_its_own(
    tiny_model: Transformer,
    toy_datamodule: ParallelDataModule,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = DatastorePlan(tmp_path)
    valid, test = toy_datamodule.valid_corpus, toy_datamodule.test_corpus
    places = {
        plan.place(corpus, tokenizer, fingerprint(tiny_model, precision))
        for corpus in (valid, test)
        for precision in ("32-true", "bf16-mixed")
    }
    assert len(places) == 4
    first = ensure_datastore(tiny_model, tokenizer, valid, plan)
    assert first.directory in places
    ensure_datastore(tiny_model, tokenizer, test, plan)
    with monkeypatch.context() as patch:
        patch.setattr(building, "build", no_build)
        assert ensure_datastore(tiny_model, tokenizer, valid, plan).manifest == first.manifest
        with pytest.raises(AssertionError, match="to be built"):
            ensure_datastore(tiny_model, tokenizer, valid, dataclasses.replace(plan, rebuild=True))
    with torch.no_grad():
        tiny_model.output_projection.weight[5] += 1  # tied, so it changes the embeddings too
    other = ensure_datastore(tiny_model, tokenizer, valid, plan)
    assert other.directory not in places


@pytest.mark.parametrize("name", ["key_layer", "other_text"])
def test_settings_that_do_not_exist_are_rejected(tmp_path: Path, name: str) -> None:
    wrong: dict[str, Any] = {name: "attention"}
    with pytest.raises(ValueError, match=rf"knn\.{name}.*'attention'"):
        DatastorePlan(tmp_path, **wrong)
