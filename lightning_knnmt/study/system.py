"""A finished run's system and what it is asked: model, text, and retrieval if the run had it."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lightning_knnmt.analysis.predictions import PredictionComparison
from lightning_knnmt.data import Batch, ParallelDataModule, Tokenizer
from lightning_knnmt.decoding import (
    BeamSearch,
    NextTokenDistribution,
    SoftmaxDistribution,
    translate_batches,
)
from lightning_knnmt.evaluation.bootstrap import Resampled, resample
from lightning_knnmt.evaluation.scoring import Bleu
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained import load_pretrained
from lightning_knnmt.retrieval import (
    FlatIndex,
    LocalSource,
    Precision,
    Record,
    Recorder,
    Retrieval,
    RetrievalPlan,
    Retriever,
    teacher_forced,
)
from lightning_knnmt.study.plan import Run, StudyError
from lightning_knnmt.study.process import BEST

ROWS_AT_ONCE = 128  # bounds the systems' [rows, V] log-probabilities: 16 MB each for 32,000 tokens
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class System:
    """What a run tested.

    Attributes:
        name: The method.
        model: With the best checkpoint's weights, in evaluation mode.
        tokenizer: Of the model.
        datamodule: The domain's text.
        search: The run's; asked for speed and BLEU, it decodes greedily.
        precision: The arithmetic of the run's passes.
        retrieval: None if the run had none.
        base: The model's own distribution.
        distribution: What decodes: the base, or mixed with the datastore's.
        num_sentences: How many sentences of a text the slow analyses use, at most.
    """

    name: str
    model: Transformer
    tokenizer: Tokenizer
    datamodule: ParallelDataModule
    search: BeamSearch
    precision: Precision
    retrieval: Retrieval | None
    base: SoftmaxDistribution
    distribution: NextTokenDistribution
    num_sentences: int

    @property
    def bleu(self) -> Bleu:
        """BLEU for the target language."""
        return Bleu.for_language(self.datamodule.target_lang, self.datamodule.bleu_tokenizer)


def load_system(run: Run, num_sentences: int) -> System:
    """Rebuilds a finished run's system from the configuration in its folder.

    Datastore, index and combiner are found where the run left them.

    Raises:
        StudyError: If the folder has no configuration, or one that cannot be analysed.
    """
    config = _configuration(run.directory)
    checkpoint = run.directory / BEST
    source: Any = load_pretrained(checkpoint) if checkpoint.exists() else instantiate(config.model)
    model: Transformer = source[0]
    tokenizer: Tokenizer = source[1]
    datamodule = instantiate(config.data, _partial_=True)(tokenizer=tokenizer)
    accelerated = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    device = "cuda" if accelerated else "cpu"
    base = SoftmaxDistribution(model.output_projection, tokenizer.vocabulary.never_emitted)
    system = System(
        run.method,
        model.to(device).eval(),
        tokenizer,
        datamodule,
        instantiate(config.decoding),
        _precision(config.trainer.precision, device),
        None,
        base,
        base,
        num_sentences,
    )
    if not config.knn:
        return system
    plan: RetrievalPlan = instantiate(config.knn).plan
    retrieval = Retrieval.prepare(
        model,
        tokenizer,
        datamodule.train_corpus,
        datamodule.valid_corpus if plan.needs_text else None,
        plan,
        score=system.bleu,
        precision=system.precision,
    )
    return replace(system, retrieval=retrieval, distribution=retrieval.distribution(base))


def _configuration(directory: os.PathLike[str]) -> DictConfig:
    path = os.path.join(directory, ".hydra", "config.yaml")
    if not os.path.exists(path):
        raise StudyError(f"{directory} has no .hydra/config.yaml of a run: delete it, run again.")
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    key_layer = OmegaConf.select(config, "knn.key_layer", default="opl_input")
    if key_layer != "opl_input":
        raise StudyError(
            f"The keys of {directory} are those of knn.key_layer={key_layer}, but the analyses "
            "compare retrieval with the output projection, so keys must be its inputs: delete the "
            "folder and run again with knn.key_layer=opl_input."
        )
    config.paths.output_dir = os.fspath(directory)
    return config


def _precision(name: str | None, device: str) -> Precision:
    """What Lightning's name of a precision means outside of training."""
    if name in (None, "32-true", "32"):
        return Precision()
    if name in AUTOCAST:
        return Precision(name, partial(torch.autocast, device, AUTOCAST[name]))
    raise StudyError(
        f"Runs with trainer.precision={name} cannot be analysed: use 32-true, "
        f"{', '.join(AUTOCAST)} or trainer=cpu_bf16."
    )


def first_sentences(system: System, split: str) -> list[Batch]:
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


def record_text(system: System, split: str, num_neighbours: int) -> Record:
    """Records one exact pass over a split's first sentences, with queries.

    Args:
        system: With retrieval.
        split: "valid" or "test".
        num_neighbours: K; all entries if there are fewer.
    """
    assert system.retrieval is not None, "only retrieval has neighbours"
    datastore = system.retrieval.datastore
    num_neighbours = min(num_neighbours, len(datastore))
    index = FlatIndex(datastore.keys, system.retrieval.measured_index.index.metric)
    retriever = Retriever(LocalSource(index, datastore.values), num_neighbours)
    recorder = Recorder(retriever, system.base, keep_queries=True)
    for labelled in teacher_forced(system.model, first_sentences(system, split), system.precision):
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
        more: Further distributions over the states of one of the systems, with its name.
        batches: Of the text.
    """
    comparison = PredictionComparison()
    own = {name: (name, system.distribution) for name, system in systems.items()}
    for batch in batches:
        states = {}
        for name, system in systems.items():
            (labelled,) = teacher_forced(system.model, [batch], system.precision)
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
    system: System, batches: Sequence[Batch], distribution: NextTokenDistribution | None = None
) -> dict[int, list[int]]:
    """Greedy translations within the run's own bounds on length, by the sentence's row.

    Args:
        system: Whose model translates.
        batches: Of the text.
        distribution: Another than the system's own.
    """
    greedy = replace(system.search, beam_size=1)
    distribution = distribution or system.distribution
    with system.precision.context():
        found = translate_batches(
            system.model, system.tokenizer.vocabulary, batches, greedy, distribution
        )
        return {row: hypotheses[0].tokens for row, hypotheses in found}


def greedy_bleu(system: System, split: str, distribution: NextTokenDistribution) -> Resampled:
    """BLEU of greedy translations of a split's first sentences, with its bootstrap samples."""
    found = translate_greedily(system, first_sentences(system, split), distribution)
    texts = [system.tokenizer.decode(found[i]) for i in range(len(found))]
    return resample(texts, system.datamodule.references(split)[: len(texts)], system.bleu)


def relative_speed(
    base: System, other: System, batches: Sequence[Batch], repeats: int = 3
) -> float:
    """Tokens per second of greedy decoding, as a share of the base's; the two take turns.

    Args:
        base: The system that the other is compared with.
        batches: Of the text.
        repeats: Rounds; medians are compared.
    """
    on_processor = next(base.model.parameters()).device.type == "cpu"
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
