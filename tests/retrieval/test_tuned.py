"""Values of a combiner: what is given stays, what is not is tuned once and kept."""

import json
from collections.abc import Callable
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
    Index,
    Precision,
    Record,
    TunedCombiner,
    TuningText,
    ensure_datastore,
)
from lightning_knnmt.retrieval.combiner import DistanceCombiner
from lightning_knnmt.retrieval.errors import CombinerError

ROWS = np.arange(8)  # of the validation text


class Counted(TuningText):
    """Counts how often the text was recorded: tuning starts with that."""

    num_records = 0

    def record(self, index: Index, k: int, keep_best: int = 0) -> Record:
        self.num_records += 1
        return super().record(index, k, keep_best)


@pytest.fixture
def store(tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path) -> Datastore:
    plan = DatastorePlan(tmp_path / "datastores")
    tokenizer = toy_datamodule.tokenizer
    return ensure_datastore(tiny_model, tokenizer, toy_datamodule.train_corpus, plan)


NewText = Callable[..., Counted]


@pytest.fixture
def new_text(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, store: Datastore
) -> NewText:
    valid = CorpusView(toy_datamodule.valid_corpus, ROWS, "a part")

    def make(corpus: Corpus | None = valid) -> Counted:
        return Counted(
            tiny_model, toy_datamodule.tokenizer, corpus, store, FlatChoice(), "l2",
            precision=Precision(), max_tokens=400,
        )  # fmt: skip

    return make


def kept(store: Datastore) -> list[Path]:
    return sorted((store.directory / "tuning").glob("*.json"))


def test_values_that_are_all_given_need_no_text(new_text: NewText, store: Datastore) -> None:
    values: dict[str, Any] = {"num_neighbours": 3, "knn_weight": 0.25, "temperature": 7.0}
    choice = TunedCombiner("fixed", values)
    assert not choice.needs_tuning
    fitted = choice.fit(new_text(None))
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
    # None on the command line is as good as nothing.
    choice = TunedCombiner.of("fixed", **{"num_neighbours": None, "knn_weight": None} | given)
    assert choice.needs_tuning
    assert choice.least_entries == given.get("num_neighbours", 1)
    fitted = choice.fit(new_text())
    assert isinstance(fitted.combiner, FixedCombiner)
    for name, value in given.items():
        assert getattr(fitted.combiner, name) == value
    assert fitted.combiner.num_neighbours <= 32


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
    ],
)
def test_values_that_cannot_be_are_rejected_at_once(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TunedCombiner.of("fixed", **wrong)


def test_fewer_neighbours_are_tried_where_that_is_asked(new_text: NewText) -> None:
    fitted = TunedCombiner.of("fixed", max_neighbours=2).fit(new_text())
    assert fitted.combiner.num_neighbours <= 2


def test_tokens_that_are_never_emitted_are_not_recorded(
    new_text: NewText, toy_datamodule: ParallelDataModule
) -> None:
    text = new_text()
    index = text.index_for(2).index
    whole = text.record(index, 2)
    labels = text.states.labels.clone()
    labels[[1, 5, 6]] = toy_datamodule.tokenizer.vocabulary.unk_id
    text.states = text.states._replace(labels=labels)
    record = text.record(index, 2)
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[[1, 5, 6]] = False
    assert record.num_tokens == len(labels) - 3
    order = torch.argsort(text.states.sentences, stable=True)
    assert torch.equal(record.gold, whole.gold[kept[order]])
    assert torch.equal(record.distances, whole.distances[kept[order]])


def test_what_was_chosen_is_kept_and_used_again(
    new_text: NewText, store: Datastore, tiny_model: Transformer
) -> None:
    choice, text = TunedCombiner.of("fixed"), new_text()
    first = choice.fit(text)
    (path,) = kept(store)
    assert choice.fit(text) == first
    assert text.num_records == 1
    # Other settings, another kind or another output projection are other questions.
    for number, other in enumerate(
        (
            TunedCombiner.of("fixed", max_neighbours=4),
            TunedCombiner.of("fixed", temperature=5.0),
            TunedCombiner.of("distance"),
        ),
        start=2,
    ):
        other.fit(new_text())
        assert len(kept(store)) == number
    tiny_model.untie_output_projection()  # the datastore stays the model's
    with torch.no_grad():
        tiny_model.output_projection.weight[7] += 0.5
    choice.fit(new_text())
    assert len(kept(store)) == 5
    assert path in kept(store)


def test_a_combiner_by_distance_is_tuned_too(new_text: NewText, store: Datastore) -> None:
    fitted = TunedCombiner.of("distance", peak=0.75).fit(new_text())
    assert isinstance(fitted.combiner, DistanceCombiner)
    assert fitted.combiner.peak == 0.75
    assert fitted.report == {
        "k": fitted.combiner.num_neighbours,
        "temperature": fitted.combiner.temperature,
        "peak": 0.75,
        "reach": fitted.combiner.reach,
    }
    report = json.loads(kept(store)[0].read_text())
    assert 0 < report["accuracy"] <= 1
    assert report["settings"] > 100
    with pytest.raises(CombinerError, match=r"knn\.metric=l2"):
        TunedCombiner.of("distance").check("ip", "opl_input")
    TunedCombiner.of("fixed").check("ip", "opl_input")


DAMAGES = ["", "{", "[]", "{}", '{"values": []}', '{"values": {"num_neighbours": 0}}', "null"]


def test_what_is_kept_and_damaged_is_chosen_again(new_text: NewText, store: Datastore) -> None:
    choice, text = TunedCombiner.of("fixed", knn_weight=0.5), new_text()
    first = choice.fit(text)
    (path,) = kept(store)
    whole = json.loads(path.read_text())
    for times, damage in enumerate(DAMAGES, start=2):
        path.write_text(damage)
        assert choice.fit(text) == first
        assert text.num_records == times, damage
        assert json.loads(path.read_text()) == whole
