"""Combiners that a network makes, trained on held-out text: adaptive and robust kNN-MT."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lightning_knnmt.decoding import SoftmaxDistribution
from lightning_knnmt.files import replacing, write_atomically
from lightning_knnmt.models import KeyLayer, Transformer
from lightning_knnmt.retrieval.checks import MAX_NEIGHBOURS, check_integer, check_number
from lightning_knnmt.retrieval.combiner_file import (
    VARIANTS,
    TrainedCombiner,
    load_combiner,
    save_combiner,
)
from lightning_knnmt.retrieval.combiner_training import CombinerTrainer, distance_offset
from lightning_knnmt.retrieval.datastore import DEFAULT_KEY_LAYER, Datastore
from lightning_knnmt.retrieval.errors import CombinerError
from lightning_knnmt.retrieval.fitting import (
    FittedCombiner,
    TuningText,
    kept_name,
    output_digest,
)
from lightning_knnmt.retrieval.index import Index, Metric
from lightning_knnmt.retrieval.ranks import rank_zero_first
from lightning_knnmt.retrieval.record import Record
from lightning_knnmt.retrieval.robust import RobustCombiner, label_log_probs
from lightning_knnmt.retrieval.tuning import KNN_WEIGHTS, score_grid, temperatures_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearnedCombiner:
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

    needs_tuning = True

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
        self._untrained(temperature, 0.0)  # raises if it is not allowed

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

    def fit(self, text: TuningText) -> FittedCombiner:
        k = self.max_neighbours
        index = text.index_for(k).index
        sources = text.sources(index, k) | {
            "variant": self.variant,
            "temperature": self.temperature,
            "recipe": asdict(self.trainer),
        }
        path = text.datastore.directory / "combiners" / f"{kept_name(sources)}.safetensors"
        as_text = {name: json.dumps(value) for name, value in sources.items()}
        report = path.with_suffix(".json")

        def load_or_train() -> tuple[TrainedCombiner, float]:
            seconds = _seconds(report)
            if seconds is None or not path.exists():
                self._train(text, index, path, as_text)
                seconds = _seconds(report)
            assert seconds is not None, "a training ends with a report"
            return load_combiner(path, as_text, num_neighbours=k), seconds

        combiner, seconds = rank_zero_first(load_or_train)
        give_label_log_probs(combiner, text.datastore, text.model, text.base)
        num_parameters = sum(p.numel() for p in combiner.parameters())
        combiner.requires_grad_(False).to(text.device)
        facts = {
            "k": k,
            "temperature": combiner.temperature,
            "combiner_parameters": num_parameters,
            "combiner_seconds": seconds,
        }
        return FittedCombiner(combiner, facts, path)

    def _train(
        self, text: TuningText, index: Index, path: Path, sources: Mapping[str, str]
    ) -> None:
        record = text.record(index, self.max_neighbours, VARIANTS[self.variant].num_best)
        temperature = self.temperature
        if temperature is None:
            temperature = best_temperature(record, self.max_neighbours)
        combiner = self._untrained(temperature, distance_offset(record, text.metric))
        give_label_log_probs(combiner, text.datastore, text.model, text.base)
        bar = tqdm(desc=f"Training {self.method}'s network", unit=" updates", disable=None)
        with bar:

            def show(update: int, loss: float) -> None:
                bar.update(update - bar.n)
                bar.set_postfix(loss=f"{loss:.4f}")

            training = self.trainer.train(combiner, record, show)
        report = json.dumps(asdict(training), indent=2) + "\n"
        write_atomically(path.with_suffix(".json"), report)
        save_combiner(combiner, path, sources)  # last: what has weights has a report
        logger.info("%s's network: %s", self.method, path)

    def _untrained(self, temperature: float, offset: float) -> TrainedCombiner:
        # Lightning's evaluation, in which this may run, would make weights that nothing can train.
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.trainer.seed)
            kind = VARIANTS[self.variant]
            return kind(self.max_neighbours, temperature, distance_offset=offset)


def give_label_log_probs(
    combiner: TrainedCombiner, datastore: Datastore, model: Transformer, base: SoftmaxDistribution
) -> None:
    """Gives a robust combiner what the model expected at each entry, found once and kept.

    Args:
        combiner: Of any variant; the others need nothing.
        datastore: Whose entries these are.
        model: That made them.
        base: Its own distribution.
    """
    if not isinstance(combiner, RobustCombiner):
        return
    name = kept_name({"output_projection": output_digest(model)})
    path = datastore.directory / "label_log_probs" / f"{name}.npy"
    found = _read_values(path, len(datastore))
    if found is None:
        found = label_log_probs(
            datastore.keys, datastore.values, base, next(model.parameters()).device
        )
        with replacing(path) as partial, partial.open("wb") as file:
            np.save(file, found.numpy())
    combiner.label_log_probs = found


def best_temperature(record: Record, num_neighbours: int) -> float:
    """The T that makes the text most probable with this k and any λ."""
    grid = score_grid(record, [num_neighbours], KNN_WEIGHTS, temperatures_for(record))
    return grid.best.temperature


def _read_values(path: Path, length: int) -> Tensor | None:
    """None if missing or damaged; the caller recomputes them."""
    try:
        values = torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError):
        return None
    return values if len(values) == length else None


def _seconds(report: Path) -> float | None:
    """What a training took; None if its report is missing or damaged."""
    try:
        content: Any = json.loads(report.read_text(encoding="utf-8"))
        return float(content["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
