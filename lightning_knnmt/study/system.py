"""A finished run's system, ready to be asked: model, text, and retrieval where the run had it."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lightning_knnmt.analysis import PredictionComparison
from lightning_knnmt.data import Batch, ParallelDataModule
from lightning_knnmt.decoding import NextTokenDistribution
from lightning_knnmt.evaluation.bootstrap import Resampled, resample
from lightning_knnmt.evaluation.scoring import Bleu
from lightning_knnmt.pretrained import load_pretrained
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
from lightning_knnmt.study.process import BEST
from lightning_knnmt.training import KNNCallback, NMTModule, precision_of


@dataclass(frozen=True)
class System:
    """What a run tested.

    Attributes:
        module: With the best checkpoint's weights, in evaluation mode.
        datamodule: The domain's text.
        retrieval: None where the run had none.
        distribution: What decodes: the model's own, or mixed with the datastore's.
        num_sentences: How many of a text it is asked about, at most, where that takes time.
    """

    name: str
    module: NMTModule
    datamodule: ParallelDataModule
    trainer: pl.Trainer
    retrieval: Retrieval | None
    distribution: NextTokenDistribution
    num_sentences: int


def load_system(run: Run, num_sentences: int) -> System:
    """Builds a finished run's system from the configuration that the run left.

    Datastore, index and combiner are found where the run left them.

    Raises:
        StudyError: If the folder holds no configuration, or its keys are of another layer.
    """
    config = _configuration(run.directory)
    checkpoint = run.directory / BEST
    source: Any = load_pretrained(checkpoint) if checkpoint.exists() else instantiate(config.model)
    model, tokenizer = source
    datamodule = instantiate(config.data, _partial_=True)(tokenizer=tokenizer)
    search = instantiate(config.decoding)
    module = NMTModule(model, tokenizer, search, optimizer=partial(torch.optim.Adam, lr=0.0)).eval()
    trainer = pl.Trainer(
        accelerator=config.trainer.accelerator,
        devices=1,
        precision=config.trainer.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.strategy.connect(module)  # Lightning would do this at the start of a loop
    trainer.strategy.model_to_device()
    knn: KNNCallback | None = instantiate(config.knn) or None
    if knn is None:
        own = module.nmt_distribution
        return System(run.method, module, datamodule, trainer, None, own, num_sentences)
    retrieval = knn.prepare(model, tokenizer, datamodule, precision_of(trainer))
    mixed = retrieval.distribution(module.nmt_distribution)
    return System(run.method, module, datamodule, trainer, retrieval, mixed, num_sentences)


def _configuration(directory: Path) -> DictConfig:
    path = directory / ".hydra" / "config.yaml"
    if not path.exists():
        raise StudyError(f"{directory} holds no {path.name} of a run: delete it and run again.")
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    key_layer = OmegaConf.select(config, "knn.key_layer", default="opl_input")
    if key_layer != "opl_input":
        raise StudyError(
            f"The keys of {directory} are those of knn.key_layer={key_layer}, but the analyses "
            "compare retrieval with the output projection, so keys must be its inputs: delete it "
            "and run again with knn.key_layer=opl_input."
        )
    config.paths.output_dir = os.fspath(directory)
    return config


ROWS_AT_ONCE = 128  # bounds the systems' [rows, V] log-probabilities: 16 MB each for 32,000 tokens


def first_sentences(system: System, split: str) -> list[Batch]:
    """As many of a split's first sentences as the system is asked about, longest batch first."""
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


def record_text(system: System, split: str, num_neighbours: int) -> Record:
    """One exact pass over a split's first sentences: what is known of every token, with queries.

    Args:
        system: With retrieval.
        split: "valid" or "test".
        num_neighbours: K; all entries where there are fewer.
    """
    assert system.retrieval is not None, "only retrieval has neighbours"
    datastore = system.retrieval.datastore
    num_neighbours = min(num_neighbours, len(datastore))
    index = FlatIndex(datastore.keys, system.retrieval.measured_index.index.metric)
    recorder = Recorder(
        Retriever(LocalSource(index, datastore.values), num_neighbours),
        system.module.nmt_distribution,
        keep_queries=True,
    )
    batches = first_sentences(system, split)
    precision = precision_of(system.trainer)
    for labelled in teacher_forced(system.module.model, batches, precision):
        recorder.write(*labelled)
    return recorder.finish()


@torch.inference_mode()
def compare_predictions(
    systems: Mapping[str, System],
    more: Mapping[str, tuple[str, NextTokenDistribution]],
    batches: Sequence[Batch],
) -> PredictionComparison:
    """Asks all systems about the same gold tokens.

    Args:
        systems: By name; all of one domain, with one tokenizer.
        more: Other distributions over the hidden states of one of the systems, with its name.
        batches: Of the text.
    """
    comparison = PredictionComparison()
    distributions = {name: (name, system.distribution) for name, system in systems.items()} | dict(
        more
    )
    for batch in batches:
        states = {}
        for name, system in systems.items():
            precision = precision_of(system.trainer)
            (labelled,) = teacher_forced(system.module.model, [batch], precision)
            states[name] = labelled.states
        for start in range(0, len(labelled.labels), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            log_probs = {
                name: distribution.begin(batch.source_ids, batch.source_mask, 1)(
                    states[of].select(rows), labelled.sentences[rows]
                ).float()
                for name, (of, distribution) in distributions.items()
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


def translate(
    system: System, batches: Sequence[Batch], distribution: NextTokenDistribution | None = None
) -> dict[int, list[int]]:
    """Greedy translations, of the run's own bounds on length, by the sentence's row."""
    found: dict[int, list[int]] = {}
    greedy = replace(system.module.search, beam_size=1)
    with torch.inference_mode(), system.trainer.precision_plugin.forward_context():
        for batch in batches:
            on_device = batch.to(system.module.device)
            best = system.module.translate(on_device, greedy, distribution or system.distribution)
            found.update((i, h.tokens) for i, h in zip(batch.index.tolist(), best, strict=True))
    return found


def greedy_bleu(system: System, split: str, distribution: NextTokenDistribution) -> Resampled:
    """BLEU of greedy translations of a split's first sentences, with its bootstrap samples."""
    found = translate(system, first_sentences(system, split), distribution)
    texts = [system.module.tokenizer.decode(found[i]) for i in range(len(found))]
    data = system.datamodule
    bleu = Bleu.for_language(data.target_lang, data.bleu_tokenizer)
    return resample(texts, data.references(split)[: len(texts)], bleu)


def relative_speed(
    base: System, other: System, batches: Sequence[Batch], repeats: int = 3
) -> float:
    """Tokens a second of greedy decoding, as a share of the base's; the two take turns.

    Args:
        base: The one that the other is compared with.
        batches: Of the text.
        repeats: Rounds; medians are compared.
    """
    on_processor = base.module.device.type == "cpu"
    # Where other programs want the cores too, the processor's seconds are the steadier measure.
    clock = time.process_time if on_processor else time.perf_counter
    speeds: list[list[float]] = [[], []]
    for round_number in range(repeats + 1):
        for system, measured in zip((base, other), speeds, strict=True):
            started = clock()
            tokens = sum(len(ids) for ids in translate(system, batches).values())
            if round_number > 0:  # the first one warms up
                measured.append(tokens / (clock() - started))
    of_base, of_other = map(statistics.median, speeds)
    return of_other / of_base
