"""The system that a finished run tested, and what the analyses ask it."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from lightning_knnmt.analysis.predictions import PredictionComparison
from lightning_knnmt.data import Batch, ParallelDataModule
from lightning_knnmt.decoding import NextTokenDistribution, translate_batches
from lightning_knnmt.evaluation.bootstrap import Resampled, resample
from lightning_knnmt.evaluation.scoring import Bleu
from lightning_knnmt.retrieval import (
    FlatIndex,
    LocalSource,
    Record,
    Recorder,
    Retrieval,
    Retriever,
    teacher_forced,
)
from lightning_knnmt.study.plan import Run, StudyError
from lightning_knnmt.system import System
from lightning_knnmt.translator import Translator

ROWS_AT_ONCE = 128  # bounds the systems' [rows, V] log-probabilities: 16 MB each for 32,000 tokens


@dataclass(frozen=True)
class AnalysedSystem:
    """The system of a finished run, and its domain's text.

    Attributes:
        name: The method.
        translator: The system that the run left, loaded.
        datamodule: The domain's text.
        num_sentences: How many sentences of a text the slow analyses use, at most.
    """

    name: str
    translator: Translator
    datamodule: ParallelDataModule
    num_sentences: int

    @property
    def retrieval(self) -> Retrieval:
        """What decodes together with the model.

        Raises:
            StudyError: If the run had no retrieval, or its keys cannot be analysed.
        """
        retrieval = self.translator.retrieval
        if retrieval is None:
            raise StudyError(
                f"{self.name} has no retrieval, which its part in the analyses needs: give the "
                "part to a method with knn=..."
            )
        key_layer = retrieval.datastore.manifest.key_layer
        if key_layer != "opl_input":
            raise StudyError(
                f"The keys of {self.name} are those of knn.key_layer={key_layer}, but the analyses "
                "compare retrieval with the output projection, so keys must be its inputs: use "
                "knn.key_layer=opl_input."
            )
        return retrieval

    @property
    def bleu(self) -> Bleu:
        """BLEU for the target language."""
        return Bleu.for_language(self.datamodule.target_lang, self.datamodule.bleu_tokenizer)


def load_analysed(run: Run, num_sentences: int) -> AnalysedSystem:
    """Loads a finished run's system, and the text of its configuration.

    Raises:
        StudyError: If the run left no configuration.
        SavedSystemError: If it left no system, or a part of it has changed.
    """
    path = run.directory / ".hydra" / "config.yaml"
    if not path.exists():
        raise StudyError(f"There is no {path}: delete {run.directory} and run the study again.")
    config = OmegaConf.load(path)
    config.paths.output_dir = os.fspath(run.directory)
    accelerated = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    translator = System.load(run.directory).translator("cuda" if accelerated else "cpu")
    datamodule = instantiate(config.data, _partial_=True)(tokenizer=translator.tokenizer)
    return AnalysedSystem(run.method, translator, datamodule, num_sentences)


def first_sentences(system: AnalysedSystem, split: str) -> list[Batch]:
    """The first `num_sentences` of a split, longest batch first."""
    batches = []
    for batch in system.datamodule.whole_dataloader(split):
        rows = batch.index < system.num_sentences
        if rows.any():
            batches.append(
                batch._replace(
                    source_ids=batch.source_ids[rows],
                    target_ids=batch.target_ids[rows],
                    index=batch.index[rows],
                )
            )
    return batches


def record_text(system: AnalysedSystem, split: str, num_neighbours: int) -> Record:
    """Records one exact pass over a split's first sentences, with queries.

    Args:
        system: With retrieval.
        split: "valid" or "test".
        num_neighbours: K; all entries if there are fewer.
    """
    translator, datastore = system.translator, system.retrieval.datastore
    num_neighbours = min(num_neighbours, len(datastore))
    index = FlatIndex(datastore.keys, system.retrieval.measured_index.index.metric)
    retriever = Retriever(LocalSource(index, datastore.values), num_neighbours)
    recorder = Recorder(retriever, translator.base, keep_queries=True)
    batches = first_sentences(system, split)
    for labelled in teacher_forced(translator.model, batches, translator.precision):
        recorder.write(*labelled)
    return recorder.finish()


@torch.inference_mode()
def compare_predictions(
    systems: Mapping[str, AnalysedSystem],
    more: Mapping[str, tuple[str, NextTokenDistribution]],
    batches: Sequence[Batch],
) -> PredictionComparison:
    """Asks all systems about the same gold tokens.

    Args:
        systems: By name; all of one domain, with one tokenizer.
        more: Further distributions over the states of one of the systems, with its name.
        batches: Of the text.
    """
    comparison = PredictionComparison()
    translators = {name: system.translator for name, system in systems.items()}
    own = {name: (name, translator.distribution) for name, translator in translators.items()}
    for batch in batches:
        states = {}
        for name, translator in translators.items():
            (labelled,) = teacher_forced(translator.model, [batch], translator.precision)
            states[name] = labelled.states
        on_device = batch.to(labelled.labels.device)
        sessions = {
            name: (of, distribution.begin(on_device.source_ids, on_device.source_mask, 1))
            for name, (of, distribution) in (own | dict(more)).items()
        }
        # Rows of the session are the batch's sentences; `sentences` are rows of the corpus.
        places = on_device.label_mask.nonzero()[:, 0]
        for start in range(0, len(labelled.labels), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            log_probs = {
                name: session(states[of].select(rows), places[rows]).float()
                for name, (of, session) in sessions.items()
            }
            comparison.add(log_probs, labelled.labels[rows], labelled.sentences[rows])
    return comparison


def select_tokens(record: Record, rows: Tensor) -> Record:
    """Some of a record's tokens.

    Args:
        record: Of M tokens.
        rows: Which, [m].
    """
    parts: dict[str, Any] = {name: tensor[rows] for name, tensor in record.arrays().items()}
    return Record(queries=parts.pop("queries", None), **parts)


def translate_greedily(
    system: AnalysedSystem,
    batches: Sequence[Batch],
    distribution: NextTokenDistribution | None = None,
) -> dict[int, list[int]]:
    """Greedy translations within the run's own bounds on length, by the sentence's row.

    Args:
        system: Whose model translates.
        batches: Of the text.
        distribution: Another than the system's own.
    """
    its = system.translator
    greedy, chosen = replace(its.search, beam_size=1), distribution or its.distribution
    with its.precision.context():
        found = translate_batches(its.model, its.tokenizer.vocabulary, batches, greedy, chosen)
        return {row: hypotheses[0].tokens for row, hypotheses in found}


def greedy_bleu(
    system: AnalysedSystem, split: str, distribution: NextTokenDistribution
) -> Resampled:
    """BLEU of greedy translations of a split's first sentences, with its bootstrap samples."""
    found = translate_greedily(system, first_sentences(system, split), distribution)
    texts = [system.translator.tokenizer.decode(found[i]) for i in range(len(found))]
    return resample(texts, system.datamodule.references(split)[: len(texts)], system.bleu)


def relative_speed(
    base: AnalysedSystem, other: AnalysedSystem, batches: Sequence[Batch], repeats: int = 3
) -> float:
    """Tokens per second of greedy decoding, as a share of the base's; the two take turns.

    Args:
        base: The system that the other is compared with.
        batches: Of the text.
        repeats: Rounds; medians are compared.
    """
    on_processor = next(base.translator.model.parameters()).device.type == "cpu"
    # If other programs want the cores too, the processor's seconds are the steadier measure.
    clock = time.process_time if on_processor else time.perf_counter
    speeds: list[list[float]] = [[], []]
    for round_number in range(repeats + 1):
        for system, measured in zip((base, other), speeds, strict=True):
            started = clock()
            tokens = sum(len(ids) for ids in translate_greedily(system, batches).values())
            if round_number > 0:  # the first one warms up
                measured.append(tokens / (clock() - started))
    of_base, of_other = map(statistics.median, speeds)
    return of_other / of_base
