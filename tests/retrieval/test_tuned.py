"""Values of a combiner: what is given stays, what is not is tuned once and kept."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_knnmt.data import Corpus, ParallelDataModule
from lightning_knnmt.data.corpus import CorpusView
from lightning_knnmt.models import Transformer
from lightning_knnmt.retrieval import (
    Datastore,
    DatastorePlan,
    FixedCombiner,
    FlatChoice,
    Precision,
    TunedCombiner,
    TuningText,
    ensure_datastore,
)
from lightning_knnmt.retrieval.tuning import KNN_WEIGHTS

ROWS = np.arange(8)  # of the validation text: few sentences to decode


class Longest:
    """Prefers long translations, and counts how often it was asked."""

    tokenizer = "characters"

    def __init__(self) -> None:
        self.scores: list[float] = []

    def score(self, hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
        assert len(hypotheses) == len(references) == len(ROWS)
        self.scores.append(sum(map(len, hypotheses)))
        return self.scores[-1], "longest"


@pytest.fixture
def store(tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path) -> Datastore:
    plan = DatastorePlan(tmp_path / "datastores")
    tokenizer = toy_datamodule.tokenizer
    return ensure_datastore(tiny_model, tokenizer, toy_datamodule.train_corpus, plan)


NewText = Callable[..., TuningText]


@pytest.fixture
def new_text(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, store: Datastore
) -> NewText:
    valid = CorpusView(toy_datamodule.valid_corpus, ROWS, "a part")

    def make(score: Longest, corpus: Corpus | None = valid) -> TuningText:
        return TuningText(
            tiny_model, toy_datamodule.tokenizer, corpus, store, FlatChoice(), "l2",
            score=score, precision=Precision(), max_tokens=400,
        )  # fmt: skip

    return make


def kept(store: Datastore) -> list[Path]:
    return sorted((store.directory / "tuning").glob("*.json"))


def test_values_that_are_all_given_need_no_text(new_text: NewText, store: Datastore) -> None:
    values: dict[str, Any] = {"num_neighbours": 3, "knn_weight": 0.25, "temperature": 7.0}
    choice = TunedCombiner("fixed", values)
    assert not choice.needs_tuning
    fitted = choice.fit(new_text(Longest(), None))
    assert fitted.combiner == FixedCombiner(**values)
    assert fitted.report == {"k": 3, "knn_weight": 0.25, "temperature": 7.0}
    assert not kept(store)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"num_neighbours": 3},
        {"knn_weight": 0.35},
        {"temperature": 11.5, "num_neighbours": 4},
        {"temperature": 11.5, "knn_weight": 0.35},
    ],
)
def test_values_that_are_given_stay_and_the_others_are_tuned(
    new_text: NewText, given: dict[str, Any]
) -> None:
    score = Longest()
    # None on the command line is as good as nothing.
    choice = TunedCombiner.of("fixed", **{"num_neighbours": None, "knn_weight": None} | given)
    assert choice.needs_tuning
    assert choice.least_entries == given.get("num_neighbours", 1)
    fitted = choice.fit(new_text(score))
    assert isinstance(fitted.combiner, FixedCombiner)
    for name, value in given.items():
        assert getattr(fitted.combiner, name) == value
    if "knn_weight" not in given:
        assert fitted.combiner.knn_weight in KNN_WEIGHTS
    assert fitted.combiner.num_neighbours <= 32
    assert 1 <= len(score.scores) <= 4


def test_without_tuning_the_usual_values_fill_the_gaps() -> None:
    usual = TunedCombiner.of("fixed", tune=False)
    assert not usual.needs_tuning
    combiner = FixedCombiner(**usual.given)
    some = TunedCombiner.of("fixed", tune=False, num_neighbours=3, knn_weight=None)
    assert FixedCombiner(**some.given) == FixedCombiner(
        3, combiner.knn_weight, combiner.temperature
    )


@pytest.mark.parametrize("tune", [False, True])
def test_a_setting_that_does_not_exist_is_named(tune: bool) -> None:
    with pytest.raises(TypeError, match="'bandwidth'"):
        TunedCombiner.of("fixed", tune=tune, bandwidth=3.0)
    with pytest.raises(TypeError, match="'bandwidth'"):
        TunedCombiner("fixed", {"bandwidth": None})


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_neighbours": 0}, r"\b0\b"),
        ({"knn_weight": 1.5}, r"1\.5"),
        ({"temperature": "abc"}, "abc"),
        ({"max_neighbours": 0}, r"knn\.max_neighbours is 0"),
        ({"max_neighbours": 4096}, r"knn\.max_neighbours is 4096"),
        ({"tuning_candidates": "abc"}, r"knn\.tuning_candidates is abc"),
    ],
)
def test_values_that_cannot_be_are_rejected_at_once(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TunedCombiner.of("fixed", **wrong)


def test_fewer_neighbours_are_tried_where_that_is_asked(new_text: NewText) -> None:
    choice = TunedCombiner.of("fixed", max_neighbours=2, tuning_candidates=1)
    score = Longest()
    fitted = choice.fit(new_text(score))
    assert fitted.combiner.num_neighbours <= 2
    assert len(score.scores) == 1


def test_what_was_chosen_is_kept_and_used_again(
    new_text: NewText, store: Datastore, tiny_model: Transformer, toy_datamodule: ParallelDataModule
) -> None:
    choice, score = TunedCombiner.of("fixed", tuning_candidates=2), Longest()
    first = choice.fit(new_text(score))
    asked = len(score.scores)
    assert asked >= 1
    (path,) = kept(store)
    assert choice.fit(new_text(score)) == first
    assert len(score.scores) == asked, "nothing was decoded again"
    # Other settings, another text or another output projection are other questions.
    TunedCombiner.of("fixed", max_neighbours=4, tuning_candidates=1).fit(new_text(score))
    assert len(kept(store)) == 2
    TunedCombiner.of("fixed", temperature=5.0, tuning_candidates=1).fit(new_text(score))
    assert len(kept(store)) == 3
    tiny_model.untie_output_projection()  # the datastore stays the model's
    with torch.no_grad():
        tiny_model.output_projection.weight[7] += 0.5
    choice.fit(new_text(score))
    assert len(kept(store)) == 4
    assert path in kept(store)


DAMAGES = ["", "{", "[]", "{}", '{"values": []}', '{"values": {"num_neighbours": 0}}', "null"]


def test_what_is_kept_and_damaged_is_chosen_again(new_text: NewText, store: Datastore) -> None:
    choice, score = TunedCombiner.of("fixed", knn_weight=0.5, tuning_candidates=1), Longest()
    first = choice.fit(new_text(score))
    (path,) = kept(store)
    whole = json.loads(path.read_text())
    for times, damage in enumerate(DAMAGES, start=2):
        path.write_text(damage)
        assert choice.fit(new_text(score)) == first
        assert len(score.scores) == times, damage
        assert json.loads(path.read_text()) == whole
