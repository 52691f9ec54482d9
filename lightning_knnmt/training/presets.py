"""KNNCallbacks from flat settings, as conf/knn/ and the command line have them."""

from pathlib import Path

from lightning_knnmt.models import KeyLayer
from lightning_knnmt.retrieval import CombinerTrainer, IndexChoice, Metric
from lightning_knnmt.training.combiners import AdaptiveChoice, FixedChoice
from lightning_knnmt.training.knn_callback import KNNCallback


def fixed_knn(
    datastores: Path | str,
    index: IndexChoice,
    *,
    directory: Path | str | None = None,
    metric: Metric = "l2",
    rebuild: bool = False,
    key_layer: KeyLayer = "opl_input",
    num_neighbours: int = 8,
    knn_weight: float = 0.5,
    temperature: float = 30.0,
    tune: bool = True,
    max_neighbours: int = 32,
    tuning_candidates: int = 4,
) -> KNNCallback:
    """kNN-MT: the arguments are those of `KNNCallback` and of `FixedChoice`."""
    choice = FixedChoice(
        num_neighbours, knn_weight, temperature, tune, max_neighbours, tuning_candidates
    )
    return KNNCallback(
        datastores,
        index,
        choice,
        directory=directory,
        metric=metric,
        rebuild=rebuild,
        key_layer=key_layer,
    )


def adaptive_knn(
    datastores: Path | str,
    index: IndexChoice,
    *,
    directory: Path | str | None = None,
    metric: Metric = "l2",
    rebuild: bool = False,
    key_layer: KeyLayer = "opl_input",
    variant: str = "adaptive",
    max_neighbours: int = 32,
    temperature: float | None = None,
    trainer: CombinerTrainer | None = None,
) -> KNNCallback:
    """AK-MT: the arguments are those of `KNNCallback` and of `AdaptiveChoice`."""
    choice = AdaptiveChoice(variant, max_neighbours, temperature, trainer or CombinerTrainer())
    return KNNCallback(
        datastores,
        index,
        choice,
        directory=directory,
        metric=metric,
        rebuild=rebuild,
        key_layer=key_layer,
    )
