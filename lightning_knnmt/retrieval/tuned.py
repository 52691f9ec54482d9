"""Combiners of a few values, which are given or tuned on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from lightning_knnmt.models import KeyLayer
from lightning_knnmt.retrieval.checks import MAX_NEIGHBOURS, check_integer
from lightning_knnmt.retrieval.combiner import DistanceCombiner, FixedCombiner
from lightning_knnmt.retrieval.fitting import FittedCombiner, TuningText
from lightning_knnmt.retrieval.index import Metric
from lightning_knnmt.retrieval.record import Record
from lightning_knnmt.retrieval.tuning import RULE, Grid, tune_distance, tune_fixed

Values = Mapping[str, Any]


class Kind(NamedTuple):
    """What is known of one kind of combiner.

    Attributes:
        combiner: Made of its values.
        method: What decoding with it is called in reports.
        untuned: Values to do without tuning.
        tune: Finds the values that are not given, of a record and the given ones.
    """

    combiner: type[Any]
    method: str
    untuned: Values
    tune: Callable[..., Grid[Any]]


KINDS: dict[str, Kind] = {
    "fixed": Kind(
        FixedCombiner,
        "kNN-MT",
        {"num_neighbours": 8, "knn_weight": 0.5, "temperature": 30.0},
        tune_fixed,
    ),
    "distance": Kind(
        DistanceCombiner,
        "kNN-MT by distance",
        {"num_neighbours": 32, "temperature": 60.0, "peak": 0.8, "reach": 1000.0},
        tune_distance,
    ),
}


@dataclass(frozen=True)
class TunedCombiner:
    """A combiner of a few values: those that are not given are tuned on held-out text.

    Attributes:
        kind: "fixed": one k, λ and T for every token (Khandelwal et al., 2021); "distance": λ falls
            with the distance of the nearest neighbour.
        given: Values by the combiner's names for them; None is as good as not given.
        max_neighbours: The largest k that tuning tries.
    """

    kind: str
    given: Values = field(default_factory=dict)
    max_neighbours: int = 32

    def __post_init__(self) -> None:
        names = [each.name for each in fields(self._kind.combiner)]
        if unknown := sorted(self.given.keys() - names):
            raise TypeError(f"knn={self.kind} has no setting {unknown[0]!r}, only {names}.")
        given = {name: value for name, value in self.given.items() if value is not None}
        object.__setattr__(self, "given", given)
        check_integer("knn.max_neighbours", self.max_neighbours, most=MAX_NEIGHBOURS)
        self._kind.combiner(**{**self._kind.untuned, **given})  # raises if one is not allowed

    @classmethod
    def of(
        cls,
        kind: str,
        *,
        tune: bool = True,
        max_neighbours: int = 32,
        **values: float | None,
    ) -> TunedCombiner:
        """A combiner from flat settings.

        Args:
            tune: Whether values that are None are tuned; if not, they are the kind's usual ones.
            values: The combiner's, by its names for them.
        """
        if not tune:
            given = {name: value for name, value in values.items() if value is not None}
            values = {**KINDS[kind].untuned, **given}
        return cls(kind, values, max_neighbours)

    @property
    def _kind(self) -> Kind:
        return KINDS[self.kind]

    @property
    def method(self) -> str:
        return self._kind.method

    @property
    def needs_tuning(self) -> bool:
        return len(self.given) < len(fields(self._kind.combiner))

    @property
    def least_entries(self) -> int:
        return int(self.given.get("num_neighbours", 1))

    def check(self, metric: Metric, key_layer: KeyLayer) -> None:
        if self._kind.combiner is DistanceCombiner:
            DistanceCombiner.check_metric(metric)

    def fit(self, text: TuningText) -> FittedCombiner:
        values = dict(self.given)
        if self.needs_tuning:
            k = int(self.given.get("num_neighbours", min(self.max_neighbours, text.num_entries)))
            index = text.index_for(k).index
            make = self._kind.combiner
            values = text.kept(
                "tuning",
                text.sources(index, k) | {"rule": RULE} | asdict(self),
                lambda: self._tuned(text.record(index, k, keep_best=1)),
                lambda content: asdict(make(**content["values"])),
            )
        combiner = self._kind.combiner(**values)
        return FittedCombiner(combiner, {"k": values.pop("num_neighbours"), **values})

    def _tuned(self, record: Record) -> dict[str, Any]:
        grid = self._kind.tune(record, **self.given)
        return {
            "values": asdict(grid.best),
            "log_prob": grid.log_prob,
            "accuracy": grid.accuracy,
            "settings": grid.scores.log_probs.size,
            "extended": grid.extended,
            "tokens": grid.num_tokens,
        }
