"""What every way to get a combiner has in common."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lightning_knnmt.retrieval import Combiner, Datastore, KeyLayer, MeasuredIndex, Metric
from lightning_knnmt.training.validation import ValidationPass

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

    @property
    def least_entries(self) -> int:
        """How many entries the datastore must have."""

    def check(self, metric: Metric, key_layer: KeyLayer) -> None:
        """Raises if it cannot be made of such distances and keys."""

    def ensure(
        self, datastore: Datastore, index_for: IndexFor, validation: ValidationPass
    ) -> ReadyCombiner:
        """The combiner of this choice, made and saved unless that has been done.

        Args:
            datastore: Of the model's present weights.
            index_for: Gives an index over it for k neighbours; every rank must call it.
            validation: Records and decodes the validation set.
        """
