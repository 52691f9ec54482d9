"""How a run gets its combiner: numbers given or tuned, or a network trained on the validation set.

A choice is made once and kept beside the datastore.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_knnmt.retrieval import (
    DEFAULT_KEY_LAYER,
    VARIANTS,
    CombinerError,
    CombinerTrainer,
    Datastore,
    FixedCombiner,
    KeyLayer,
    MeasuredIndex,
    Metric,
    Record,
    RobustCombiner,
    TrainedCombiner,
    check_integer,
    check_number,
    distance_offset,
    label_log_probs,
    load_combiner,
    save_combiner,
)
from lightning_knnmt.retrieval.tuning import (
    KNN_WEIGHTS,
    Setting,
    score_grid,
    temperatures_for,
    tune,
)
from lightning_knnmt.training.combiner_choice import IndexFor, ReadyCombiner
from lightning_knnmt.training.kept import (
    kept_name,
    read_numbers,
    read_report,
    write_numbers,
    write_report,
)
from lightning_knnmt.training.ranks import rank_zero_first
from lightning_knnmt.training.validation import ValidationPass

MAX_NEIGHBOURS = 2048  # what faiss finds at once on a GPU


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
        check_integer("knn.max_neighbours", self.max_neighbours, most=MAX_NEIGHBOURS)
        check_integer("knn.tuning_candidates", self.tuning_candidates)

    @property
    def needs_validation_set(self) -> bool:
        return self.tune

    @property
    def least_entries(self) -> int:
        return 1 if self.tune else self.num_neighbours

    def check(self, metric: Metric, key_layer: KeyLayer) -> None:
        """Numbers weigh any neighbours."""

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
        path = datastore.directory / "tuning" / f"{kept_name(sources)}.json"
        known = read_report(path, lambda report: Setting(**report["setting"]))
        if known is not None:
            return known

        def decode(setting: Setting) -> float:
            return validation.bleu(datastore, measured.index, FixedCombiner(**asdict(setting)))

        record = validation.record(datastore, measured.index, k)
        tuning = tune(record, decode, num_candidates=self.tuning_candidates)
        report = {
            "setting": asdict(tuning.setting),
            "candidates": [asdict(candidate) for candidate in tuning.candidates],
        }
        write_report(path, report)
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
        check_integer("knn.max_neighbours", self.max_neighbours, most=MAX_NEIGHBOURS)
        temperature = 1.0 if self.temperature is None else self.temperature
        check_number("The temperature T", temperature, "be a number greater than 0")
        self._combiner(temperature, 0.0)  # or says why not

    @property
    def least_entries(self) -> int:
        return self.max_neighbours

    def check(self, metric: Metric, key_layer: KeyLayer) -> None:
        if self.variant == "robust" and metric != "l2":
            raise CombinerError(
                "A robust combiner is trained in noise that is one of L2 distances: leave out "
                f"knn.metric={metric}, or choose knn=adaptive."
            )
        if self.variant == "robust" and key_layer != DEFAULT_KEY_LAYER:
            raise CombinerError(
                "A robust combiner needs keys that are the output projection's inputs: leave out "
                f"knn.key_layer={key_layer}, or choose knn=adaptive."
            )

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
        path = datastore.directory / "combiners" / f"{kept_name(sources)}.safetensors"
        as_text = {name: json.dumps(value) for name, value in sources.items()}
        report = path.with_suffix(".json")
        seconds = read_report(report, lambda training: float(training["seconds"]))
        if seconds is None or not path.exists():
            self._train(datastore, measured, validation, path, as_text)
            seconds = read_report(report, lambda training: float(training["seconds"]))
        combiner = load_combiner(path, as_text, num_neighbours=k)
        _inform(combiner, datastore, validation)
        num_parameters = sum(p.numel() for p in combiner.parameters())
        combiner.requires_grad_(False).to(validation.module.device)
        return ReadyCombiner(combiner, combiner.temperature, None, num_parameters, seconds)

    def _train(
        self,
        datastore: Datastore,
        measured: MeasuredIndex,
        validation: ValidationPass,
        path: Path,
        sources: Mapping[str, str],
    ) -> None:
        num_best = VARIANTS[self.variant].num_best
        record = validation.record(datastore, measured.index, self.max_neighbours, num_best)
        temperature = self.temperature
        if temperature is None:
            temperature = best_temperature(record, self.max_neighbours)
        combiner = self._combiner(temperature, distance_offset(record, measured.index.metric))
        _inform(combiner, datastore, validation)
        training = self.trainer.train(combiner, record)
        write_report(path.with_suffix(".json"), asdict(training))
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
    path = datastore.directory / "label_log_probs" / f"{validation.output_digest[:12]}.npy"
    found = read_numbers(path, len(datastore))
    if found is None:
        nmt, device = validation.module.nmt_distribution, validation.module.device
        found = label_log_probs(datastore.keys, datastore.values, nmt, device)
        write_numbers(path, found)
    combiner.label_log_probs = found


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
