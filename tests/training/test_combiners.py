"""An adaptive combiner through KNNCallback: trained once, kept beside the datastore, reported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.retrieval import (
    CombinerTrainer,
    FlatChoice,
    KNNDistribution,
    LearnedCombiner,
    Precision,
    Retrieval,
    RobustCombiner,
    TunedCombiner,
    TuningText,
)
from lightning_knnmt.retrieval.adaptive import AdaptiveCombiner, KNNBoxCombiner
from lightning_knnmt.retrieval.errors import CombinerError
from lightning_knnmt.retrieval.learned import best_temperature
from lightning_knnmt.retrieval.tuning import KNN_WEIGHTS, score_grid, temperatures_for
from lightning_knnmt.training import KNNCallback, NMTModule, knn_callback

NewTrainer = Callable[..., pl.Trainer]
QUICK = CombinerTrainer(learning_rate=3e-3, max_updates=40, first_validation=20, validate_every=20)


@pytest.fixture
def new_adaptive(tmp_path: Path) -> Callable[..., KNNCallback]:
    def make(**options: Any) -> KNNCallback:
        defaults: dict[str, Any] = {"max_neighbours": 4, "trainer": QUICK}
        kind = options.pop("combiner", "adaptive")
        return knn_callback(kind, tmp_path / "datastores", FlatChoice(), **(defaults | options))

    return make


def kept(tmp_path: Path) -> dict[str, int]:
    files = (tmp_path / "datastores").glob("*/combiners/*.safetensors")
    return {file.name: file.stat().st_mtime_ns for file in files}


def test_it_is_trained_once_and_anew_when_something_else_is_asked(
    module: NMTModule, toy_datamodule: ParallelDataModule, tmp_path: Path,
    new_trainer: NewTrainer, new_adaptive: Callable[..., KNNCallback],
    translated: Callable[..., Any],
) -> None:  # fmt: skip
    test: dict[str, Any] = {"datamodule": toy_datamodule, "verbose": False}
    knn = new_adaptive()
    new_trainer(knn).test(module, **test)
    assert knn.retrieval is not None
    ready, first = knn.retrieval.fitted, kept(tmp_path)
    assert isinstance(ready.combiner, AdaptiveCombiner)
    assert not any(parameter.requires_grad for parameter in ready.combiner.parameters())
    assert "knn_weight" not in ready.report
    assert (
        ready.report["combiner_parameters"] == (2 * 4 + 1) * 32 + (32 + 1) * 4
    )  # two layers with biases
    (report,) = (tmp_path / "datastores").glob("*/combiners/*.json")
    training = json.loads(report.read_text())
    assert ready.report["combiner_seconds"] == training["seconds"]
    assert [update for update, _ in training["history"]] == [0, 20, 40]
    assert training["best_loss"] < training["history"][0][1]

    again = new_adaptive()
    new_trainer(again).test(module, **test)
    assert kept(tmp_path) == first
    assert again.retrieval is not None
    assert again.retrieval.fitted.report == ready.report
    assert translated(new_trainer(again), module) == translated(new_trainer(knn), module)

    asked: list[dict[str, Any]] = [
        *({"temperature": 3.0}, {"combiner": "adaptive-knnbox"}, {"metric": "ip"}),
        {"combiner": "robust"},
    ]
    for options in asked:
        before = len(kept(tmp_path))
        other = new_adaptive(**options)
        new_trainer(other).test(module, **test)
        assert len(kept(tmp_path)) == before + 1, options
    assert len(list((tmp_path / "datastores").iterdir())) == 1
    assert isinstance(other.retrieval, Retrieval)
    robust, datastore = other.retrieval.fitted.combiner, other.retrieval.datastore
    assert isinstance(robust, RobustCombiner)
    assert robust.label_log_probs is not None
    assert len(robust.label_log_probs) == len(datastore)
    with torch.no_grad():
        logits = module.model.output_projection(torch.from_numpy(datastore.keys[:5]).float())
    expected = logits.log_softmax(-1)[range(5), datastore.values[:5].tolist()]
    torch.testing.assert_close(robust.label_log_probs[:5], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(CombinerError, match="metric"):
        new_trainer(new_adaptive(combiner="robust", metric="ip")).test(module, **test)


def test_without_a_temperature_it_takes_the_one_that_fixed_numbers_are_best_with(
    module: NMTModule, toy_datamodule: ParallelDataModule,
    new_trainer: NewTrainer, new_adaptive: Callable[..., KNNCallback],
) -> None:  # fmt: skip
    knn = new_adaptive(combiner="adaptive-knnbox")
    module.eval()
    model, tokenizer = module.model, module.tokenizer
    retrieval = knn.prepare(model, tokenizer, toy_datamodule)
    assert isinstance(retrieval.fitted.combiner, KNNBoxCombiner)
    text = TuningText(
        module.model, module.tokenizer, toy_datamodule.valid_corpus, retrieval.datastore,
        FlatChoice(), "l2", precision=Precision(), max_tokens=4096,
    )  # fmt: skip
    record = text.record(retrieval.measured_index.index, 4)
    temperatures = temperatures_for(record)
    score_of = {t: score_grid(record, [4], KNN_WEIGHTS, [t]).log_prob for t in temperatures}
    assert retrieval.fitted.report["temperature"] == max(temperatures, key=score_of.__getitem__)
    assert best_temperature(record, 4) == retrieval.fitted.report["temperature"]
    assert knn.prepare(model, tokenizer, toy_datamodule) is retrieval

    # another output projection shares the datastore, but p_NMT is another
    module.model.untie_output_projection()
    with torch.no_grad():
        module.model.output_projection.weight += 1
    assert (
        knn.prepare(model, tokenizer, toy_datamodule).fitted.combiner
        is not retrieval.fitted.combiner
    )


def test_a_fit_that_leaves_the_body_alone_is_validated_with_it(
    module: NMTModule, toy_datamodule: ParallelDataModule, tmp_path: Path,
    new_trainer: NewTrainer, new_adaptive: Callable[..., KNNCallback],
) -> None:  # fmt: skip
    class Spy(pl.Callback):
        seen: tuple[type, ...] = ()

        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            distribution = pl_module.distribution
            self.seen += (type(distribution), type(getattr(distribution, "combiner", None)))

    knn, spy = new_adaptive(), Spy()
    new_trainer(knn).validate(module, datamodule=toy_datamodule, verbose=False)
    module.model.untie_output_projection()
    module.model.requires_grad_(False)
    module.model.output_projection.requires_grad_(True)
    new_trainer(knn, spy, max_epochs=2).fit(module, datamodule=toy_datamodule)
    assert {*spy.seen} == {KNNDistribution, AdaptiveCombiner}
    assert len(kept(tmp_path)) >= 3, "each state of the output projection has its own"
    assert len(list((tmp_path / "datastores").iterdir())) == 1


def test_choices_that_cannot_be_are_refused_at_once() -> None:
    random_state = torch.get_rng_state()
    assert (TunedCombiner("fixed").method, LearnedCombiner().method) == ("kNN-MT", "AK-MT")
    assert LearnedCombiner("robust", 12).method == "robust kNN-MT"
    assert torch.equal(torch.get_rng_state(), random_state)
    with pytest.raises(CombinerError, match=r"sturdy.*adaptive-knnbox"):
        LearnedCombiner("sturdy")
    with pytest.raises(CombinerError, match="weigh 12 neighbours"):
        LearnedCombiner(max_neighbours=12)
    with pytest.raises(CombinerError, match=r"temperature T is 0\.0"):
        LearnedCombiner(temperature=0.0)
