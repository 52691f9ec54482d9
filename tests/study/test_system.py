"""What systems are asked, for the analyses."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.decoding import BeamSearch, SoftmaxDistribution
from lightning_knnmt.models import Transformer
from lightning_knnmt.study import analyses
from lightning_knnmt.study import system as system_file
from lightning_knnmt.study.plan import Run, StudyError
from lightning_knnmt.study.system import (
    System,
    compare_predictions,
    first_sentences,
    load_system,
    relative_speed,
    translate,
)
from lightning_knnmt.training import NMTModule


def test_keys_of_another_layer_cannot_be_analysed(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("knn: {key_layer: ffn_input}\npaths: {}\n")
    run = Run("it", "kNN-MT", "it", (), tmp_path, None)
    with pytest.raises(
        StudyError, match=r"knn.key_layer=ffn_input, but the analyses compare .*del"
    ):
        load_system(run, 10)


@pytest.fixture
def system(tiny_model: Transformer, toy_datamodule: ParallelDataModule) -> System:
    adam = functools.partial(torch.optim.Adam, lr=0.0)
    search = BeamSearch(beam_size=3, max_length_ratio=0.5, max_length_offset=1)
    module = NMTModule(tiny_model, toy_datamodule.tokenizer, search, optimizer=adam).eval()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    own = module.nmt_distribution
    return System("NMT", module, toy_datamodule, trainer, None, own, num_sentences=10)


def test_translations_are_greedy_within_the_runs_own_bounds(system: System) -> None:
    batches = first_sentences(system, "test")
    found = translate(system, batches)
    assert sorted(found) == list(range(10))
    greedy = BeamSearch(beam_size=1, max_length_ratio=0.5, max_length_offset=1)
    with torch.inference_mode():
        for batch in batches:
            expected = system.module.translate(batch, greedy, system.distribution)
            assert [found[i] for i in batch.index.tolist()] == [each.tokens for each in expected]


def test_predictions_are_those_of_each_systems_own_hidden_states(system: System) -> None:
    projection = system.module.model.output_projection
    another = torch.nn.Linear(projection.in_features, projection.out_features)
    other = dataclasses.replace(system, name="other", distribution=SoftmaxDistribution(another))
    batches = first_sentences(system, "test")
    report = compare_predictions(
        {"NMT": system, "other": other}, {"more": ("NMT", other.distribution)}, batches
    ).report()
    probs: dict[str, list[float]] = {"NMT": [], "other": []}
    with torch.no_grad():
        for batch in batches:
            hidden = system.module.model(batch.source_ids, batch.decoder_input)
            for name, layer in (("NMT", projection), ("other", another)):
                everything = torch.softmax(layer(hidden).double(), dim=-1)
                for row, column in batch.label_mask.nonzero().tolist():
                    label = int(batch.labels[row, column])
                    probs[name].append(float(everything[row, column, label]))
    assert report.num_sentences == 10
    for name, expected in probs.items():
        found = report.gold[name].probabilities
        assert found.count == len(expected)
        assert found.mean == pytest.approx(np.mean(expected), rel=1e-5)
    assert report.gold["more"].probabilities == report.gold["other"].probabilities


def test_speed_is_tokens_a_second_over_the_bases(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = dataclasses.replace(system, name="slow")
    now = 0.0
    seconds = {"NMT": iter([9.0, 1.0, 2.0, 8.0]), "slow": iter([9.0, 6.0, 3.0, 9.0])}

    def stand_in(asked: System, _: object) -> dict[int, list[int]]:
        nonlocal now
        now += next(seconds[asked.name])
        return {0: [1] * (12 if asked.name == "NMT" else 18)}

    monkeypatch.setattr(system_file, "translate", stand_in)
    monkeypatch.setattr(system_file.time, "process_time", lambda: now)
    # medians of 12, 6 and 1.5 tokens a second, and of 3, 6 and 2; the first round warms up
    assert relative_speed(system, slow, []) == pytest.approx(3.0 / 6.0)


def test_the_order_is_of_the_combiner_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(name: str) -> Any:
        return SimpleNamespace(
            name=name,
            distribution=f"{name} as it is",
            module=SimpleNamespace(nmt_distribution=f"{name}'s model"),
            retrieval=SimpleNamespace(
                datastore=f"{name}'s datastore",
                measured_index=SimpleNamespace(index=f"{name}'s index"),
                ready=SimpleNamespace(combiner=f"{name}'s combiner"),
            ),
        )

    monkeypatch.setattr(analyses, "with_retrieval", lambda *parts: parts)
    monkeypatch.setattr(analyses, "greedy_bleu", lambda asked, _, mixed: (asked.name, mixed))
    after, before = analyses.analyse_order(stand_in("adapted"), stand_in("base"))
    assert after == ("adapted", "adapted as it is")
    parts = ("adapted's model", "adapted's datastore", "adapted's index", "base's combiner")
    assert before == ("adapted", parts)
