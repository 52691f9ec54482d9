"""What systems are asked, for the analyses."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.decoding import BeamSearch, SoftmaxDistribution, translate_batches
from lightning_knnmt.models import Transformer
from lightning_knnmt.retrieval import SavedSystemError
from lightning_knnmt.study import analysed_system as system_file
from lightning_knnmt.study import analyses
from lightning_knnmt.study.analysed_system import (
    AnalysedSystem,
    compare_predictions,
    first_sentences,
    load_analysed,
    relative_speed,
    translate_greedily,
)
from lightning_knnmt.study.plan import Run, StudyError
from lightning_knnmt.translator import Translator


@pytest.fixture
def system(tiny_model: Transformer, toy_datamodule: ParallelDataModule) -> AnalysedSystem:
    search = BeamSearch(beam_size=3, max_length_ratio=0.5, max_length_offset=1)
    translator = Translator(tiny_model, toy_datamodule.tokenizer, search=search)
    return AnalysedSystem("NMT", translator, toy_datamodule, num_sentences=10)


def test_runs_that_left_no_system_cannot_be_analysed(tmp_path: Path) -> None:
    run = Run("it", "kNN-MT", "it", (), tmp_path, None)
    with pytest.raises(StudyError, match=r"config\.yaml.*delete"):
        load_analysed(run, 10)
    (tmp_path / ".hydra").mkdir()
    config = "paths: {}\ntrainer: {accelerator: cpu}\n"
    (tmp_path / ".hydra" / "config.yaml").write_text(config)
    with pytest.raises(SavedSystemError, match=str(tmp_path)):
        load_analysed(run, 10)


def test_parts_that_need_retrieval_say_so(system: AnalysedSystem) -> None:
    with pytest.raises(StudyError, match=r"NMT .*knn="):
        _ = system.retrieval
    manifest = SimpleNamespace(key_layer="ffn_input")
    translator: Any = SimpleNamespace(
        retrieval=SimpleNamespace(datastore=SimpleNamespace(manifest=manifest))
    )
    other = dataclasses.replace(system, name="kNN-MT", translator=translator)
    with pytest.raises(StudyError, match=r"kNN-MT.*=ffn_input.*=opl_input"):
        _ = other.retrieval
    manifest.key_layer = "opl_input"
    assert other.retrieval is translator.retrieval
    translator.retrieval.fitted = SimpleNamespace(combiner="trained")
    with pytest.raises(StudyError, match=r"kNN-MT .*retrieval.*knn=fixed"):
        analyses._setting(other)


def test_translations_are_greedy_within_the_runs_own_bounds(system: AnalysedSystem) -> None:
    batches = first_sentences(system, "test")
    found = translate_greedily(system, batches)
    assert sorted(found) == list(range(10))
    greedy = BeamSearch(beam_size=1, max_length_ratio=0.5, max_length_offset=1)
    its = system.translator
    expected = translate_batches(
        its.model, its.tokenizer.vocabulary, batches, greedy, its.distribution
    )
    assert found == {row: hypotheses[0].tokens for row, hypotheses in expected}


def test_predictions_are_those_of_each_systems_own_hidden_states(system: AnalysedSystem) -> None:
    its = system.translator
    projection = its.model.output_projection
    another = torch.nn.Linear(projection.in_features, projection.out_features)
    translator = Translator(its.model, its.tokenizer)
    translator.distribution = SoftmaxDistribution(another)
    other = dataclasses.replace(system, name="other", translator=translator)
    batches = first_sentences(system, "test")
    report = compare_predictions(
        {"NMT": system, "other": other}, {"more": ("NMT", translator.distribution)}, batches
    ).report()
    probs: dict[str, list[float]] = {"NMT": [], "other": []}
    with torch.no_grad():
        for batch in batches:
            hidden = its.model(batch.source_ids, batch.decoder_input).hidden
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


def test_a_session_is_asked_about_its_own_rows(
    system: AnalysedSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_file, "ROWS_AT_ONCE", 3)
    asked: list[tuple[int, list[int]]] = []

    class Watched:
        """Notes which rows of which batch it is asked about."""

        def begin(self, source_ids: torch.Tensor, mask: torch.Tensor, beam_size: int) -> Any:
            batch = len(asked)
            asked.append((len(source_ids) * beam_size, []))

            def session(states: Any, rows: torch.Tensor) -> torch.Tensor:
                assert len(states.hidden) == len(rows)
                asked[batch][1].extend(rows.tolist())
                return base(states)

            return session

    batches = first_sentences(system, "test")
    watched: Any = Watched()
    base = system.translator.base
    system.translator.distribution = watched
    compare_predictions({"NMT": system}, {}, batches)
    assert len(asked) == len(batches)
    for (num_rows, rows), batch in zip(asked, batches, strict=True):
        assert num_rows == len(batch.index)
        assert rows == batch.label_mask.nonzero()[:, 0].tolist()


def test_speed_is_tokens_a_second_over_the_bases(
    system: AnalysedSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = dataclasses.replace(system, name="slow")
    now = 0.0
    seconds = {"NMT": iter([9.0, 1.0, 2.0, 8.0]), "slow": iter([9.0, 6.0, 3.0, 9.0])}

    def stand_in(asked: AnalysedSystem, _: object) -> dict[int, list[int]]:
        nonlocal now
        now += next(seconds[asked.name])
        return {0: [1] * (12 if asked.name == "NMT" else 18)}

    monkeypatch.setattr(system_file, "translate_greedily", stand_in)
    monkeypatch.setattr(system_file.time, "process_time", lambda: now)
    # medians of 12, 6 and 1.5 tokens a second, and of 3, 6 and 2; the first round warms up
    assert relative_speed(system, slow, []) == pytest.approx(3.0 / 6.0)


def test_the_order_is_of_the_combiner_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class Mixed:
        datastore: str
        fitted: str

        def distribution(self, base: str) -> tuple[str, ...]:
            return base, self.datastore, self.fitted

    def stand_in(name: str) -> Any:
        return SimpleNamespace(
            name=name,
            translator=SimpleNamespace(distribution=f"{name} as it is", base=f"{name}'s model"),
            retrieval=Mixed(f"{name}'s datastore", f"{name}'s combiner"),
        )

    monkeypatch.setattr(analyses, "greedy_bleu", lambda asked, _, mixed: (asked.name, mixed))
    after, before = analyses.analyse_order(stand_in("adapted"), stand_in("base"))
    assert after == ("adapted", "adapted as it is")
    parts = ("adapted's model", "adapted's datastore", "base's combiner")
    assert before == ("adapted", parts)
