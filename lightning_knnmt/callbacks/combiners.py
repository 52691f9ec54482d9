"""How a run gets its combiner: numbers given or tuned, or a network trained on the validation set.

A choice is made once and kept beside the datastore, under a digest of all that it depends on.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lightning_knnmt.callbacks.ranks import rank_zero_first
from lightning_knnmt.callbacks.validation import ValidationPass
from lightning_knnmt.retrieval import (
    DEFAULT_KEY_LAYER,
    VARIANTS,
    Combiner,
    CombinerError,
    CombinerTrainer,
    Datastore,
    FixedCombiner,
    MeasuredIndex,
    Record,
    RobustCombiner,
    TrainedCombiner,
    distance_offset,
    label_log_probs,
    load_combiner,
    save_combiner,
)
from lightning_knnmt.tuning import KNN_WEIGHTS, Setting, score_grid, temperatures_for, tune

IndexFor = Callable[[int], MeasuredIndex]


@dataclass(frozen=True)
class ReadyCombiner:
    """A combiner and what reports say about it.

    Attributes:
        combiner: Weighs the neighbours.
        temperature: Its T.
        knn_weight: Its λ; None if it decides that for each token.
        num_parameters: Numbers that were trained; None if nothing was.
        seconds: What their training took, when it was done; None if nothing was trained.
    """

    combiner: Combiner
    temperature: float
    knn_weight: float | None = None
    num_parameters: int | None = None
    seconds: float | None = None


class CombinerChoice(Protocol):
    """A way to get a combiner for a model and its datastore."""

    @property
    def method(self) -> str:
        """What decoding with it is called in reports."""

    @property
    def needs_validation_set(self) -> bool:
        """Whether it is made on the validation set."""

    def ensure(
        self, datastore: Datastore, index_for: IndexFor, validation: ValidationPass
    ) -> ReadyCombiner:
        """The combiner of this choice, made and saved unless that has been done.

        Args:
            datastore: Of the model's present weights.
            index_for: Gives an index over it for k neighbours; every rank must call it.
            validation: Records and decodes the validation set.
        """


@dataclass(frozen=True)
class FixedChoice:
    """One k, λ and T for every token, given or tuned (Khandelwal et al., 2021).

    Attributes:
        num_neighbours: k, if it is not tuned.
        knn_weight: λ, if it is not tuned.
        temperature: T, if it is not tuned.
        tune: Choose k, λ and T on the validation set.
        max_neighbours: The largest k tried.
        tuning_candidates: Settings decoded with; the others are judged by log p(gold) alone.
    """

    num_neighbours: int = 8
    knn_weight: float = 0.5
    temperature: float = 30.0
    tune: bool = True
    max_neighbours: int = 32
    tuning_candidates: int = 4

    method = "kNN-MT"

    def __post_init__(self) -> None:
        # says now what is wrong with them
        FixedCombiner(self.num_neighbours, self.knn_weight, self.temperature)

    @property
    def needs_validation_set(self) -> bool:
        return self.tune

    def ensure(
        self, datastore: Datastore, index_for: IndexFor, validation: ValidationPass
    ) -> ReadyCombiner:
        setting = Setting(self.num_neighbours, self.knn_weight, self.temperature)
        if self.tune:
            k = min(self.max_neighbours, len(datastore))
            measured = index_for(k)
            setting = rank_zero_first(
                validation.trainer, lambda: self._tuned(datastore, measured, k, validation)
            )
        combiner = FixedCombiner(**asdict(setting))
        return ReadyCombiner(combiner, setting.temperature, setting.knn_weight)

    def _tuned(
        self, datastore: Datastore, measured: MeasuredIndex, k: int, validation: ValidationPass
    ) -> Setting:
        # Another output projection shares the datastore, but p_NMT and the best setting are others.
        sources = _sources(measured, k, validation) | {"candidates": self.tuning_candidates}
        path = datastore.directory / "tuning" / f"{_name(sources)}.json"
        if path.exists():
            return Setting(**json.loads(path.read_text())["setting"])

        def decode(setting: Setting) -> float:
            return validation.bleu(datastore, measured.index, FixedCombiner(**asdict(setting)))

        record = validation.record(datastore, measured.index, k)
        tuning = tune(record, decode, num_candidates=self.tuning_candidates)
        report = {
            "setting": asdict(tuning.setting),
            "candidates": [asdict(candidate) for candidate in tuning.candidates],
        }
        _write(path, report)
        return tuning.setting


@dataclass(frozen=True)
class AdaptiveChoice:
    """A network that weighs each token's neighbours, trained on the validation set (AK-MT).

    Attributes:
        variant: "adaptive" (Zheng et al., 2021), "adaptive-knnbox" or "robust" (Jiang et al.,
            2022).
        max_neighbours: K; but for the last variant a power of two.
        temperature: T; None for the one that a fixed combiner is best with.
        trainer: The recipe; its seed draws the initial weights too.
    """

    variant: str = "adaptive"
    max_neighbours: int = 32
    temperature: float | None = None
    trainer: CombinerTrainer = field(default_factory=CombinerTrainer)

    needs_validation_set = True

    @property
    def method(self) -> str:
        return "robust kNN-MT" if self.variant == "robust" else "AK-MT"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise CombinerError(
                f"There is no combiner {self.variant!r}: choose one of {', '.join(VARIANTS)}."
            )
        self._combiner(
            1.0 if self.temperature is None else self.temperature, 0.0
        )  # or says why not

    def ensure(
        self, datastore: Datastore, index_for: IndexFor, validation: ValidationPass
    ) -> ReadyCombiner:
        measured = index_for(self.max_neighbours)
        return rank_zero_first(
            validation.trainer, lambda: self._trained(datastore, measured, validation)
        )

    def _trained(
        self, datastore: Datastore, measured: MeasuredIndex, validation: ValidationPass
    ) -> ReadyCombiner:
        k = self.max_neighbours
        sources = _sources(measured, k, validation) | {
            "variant": self.variant,
            "temperature": self.temperature,
            "recipe": asdict(self.trainer),
        }
        path = datastore.directory / "combiners" / f"{_name(sources)}.safetensors"
        as_text = {name: json.dumps(value) for name, value in sources.items()}
        if not path.exists():
            self._train(datastore, measured, validation, path, as_text)
        combiner = load_combiner(path, as_text, num_neighbours=k)
        _inform(combiner, datastore, validation)
        num_parameters = sum(p.numel() for p in combiner.parameters())
        combiner.requires_grad_(False).to(validation.module.device)
        seconds = json.loads(path.with_suffix(".json").read_text())["seconds"]
        return ReadyCombiner(combiner, combiner.temperature, None, num_parameters, seconds)

    def _train(
        self,
        datastore: Datastore,
        measured: MeasuredIndex,
        validation: ValidationPass,
        path: Path,
        sources: Mapping[str, str],
    ) -> None:
        if self.variant == "robust" and measured.index.metric != "l2":
            raise CombinerError(
                "A robust combiner is trained in noise that is one of L2 distances: leave out "
                f"knn.metric={measured.index.metric}, or choose knn=adaptive."
            )
        num_best = VARIANTS[self.variant].num_best
        record = validation.record(datastore, measured.index, self.max_neighbours, num_best)
        temperature = self.temperature
        if temperature is None:
            temperature = best_temperature(record, self.max_neighbours)
        combiner = self._combiner(temperature, distance_offset(record, measured.index.metric))
        _inform(combiner, datastore, validation)
        training = self.trainer.train(combiner, record)
        _write(path.with_suffix(".json"), asdict(training))
        save_combiner(combiner, path, sources)  # last: what has weights has a report

    def _combiner(self, temperature: float, offset: float) -> TrainedCombiner:
        # Lightning's evaluation, in which this may run, would make weights that nothing can train.
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.trainer.seed)
            kind = VARIANTS[self.variant]
            return kind(self.max_neighbours, temperature, distance_offset=offset)


def _inform(combiner: TrainedCombiner, datastore: Datastore, validation: ValidationPass) -> None:
    """Tells a robust combiner what the model expected at each entry, found once and kept."""
    if not isinstance(combiner, RobustCombiner):
        return
    if datastore.manifest.key_layer != DEFAULT_KEY_LAYER:
        raise CombinerError(
            "A robust combiner needs keys that are the output projection's inputs: leave out "
            f"knn.key_layer={datastore.manifest.key_layer}, or choose knn=adaptive."
        )
    directory = datastore.directory / "label_log_probs"
    path = directory / f"{validation.output_digest[:12]}.npy"
    if not path.exists():
        nmt, device = validation.module.nmt_distribution, validation.module.device
        found = label_log_probs(datastore.keys, datastore.values, nmt, device)
        directory.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, found.numpy(), allow_pickle=False)
        partial.replace(path)
    combiner.label_log_probs = torch.from_numpy(np.load(path, allow_pickle=False))


def best_temperature(record: Record, num_neighbours: int) -> float:
    """The T that makes the text most probable with this k and any λ."""
    grid = score_grid(record, [num_neighbours], KNN_WEIGHTS, temperatures_for(record))
    return grid.temperatures[int(grid.scores[0].max(axis=1).argmax())]


def _sources(measured: MeasuredIndex, k: int, validation: ValidationPass) -> dict[str, Any]:
    """What every choice depends on, besides the datastore that it is kept in."""
    return {
        "corpus": validation.datamodule.valid_corpus.digest,
        "index": measured.index.description,
        "k": k,
        "output_projection": validation.output_digest,
    }


def _name(sources: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:12]


def _write(path: Path, report: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(path)
