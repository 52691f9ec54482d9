"""Everything that decoding with retrieval needs, made ready for one model."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from lightning_knnmt.data import Corpus, Tokenizer
from lightning_knnmt.decoding import SoftmaxDistribution
from lightning_knnmt.models import Transformer
from lightning_knnmt.retrieval.building import DatastorePlan, check_buildable, ensure_datastore
from lightning_knnmt.retrieval.choice import IndexChoice, MeasuredIndex
from lightning_knnmt.retrieval.datastore import Datastore
from lightning_knnmt.retrieval.distribution import KNNDistribution
from lightning_knnmt.retrieval.fitting import (
    CombinerChoice,
    FittedCombiner,
    TuningText,
    output_digest,
)
from lightning_knnmt.retrieval.index import Metric, check_k, check_metric
from lightning_knnmt.retrieval.retriever import LocalSource, Retriever
from lightning_knnmt.retrieval.teacher_forcing import Precision, fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetrievalPlan:
    """How retrieval is to be prepared.

    Attributes:
        datastore: Where the datastore is or will be.
        index: How an index is chosen.
        combiner: How a combiner is.
        metric: "l2" (squared) or "ip" (inner product).
    """

    datastore: DatastorePlan
    index: IndexChoice
    combiner: CombinerChoice
    metric: Metric = "l2"

    def __post_init__(self) -> None:
        check_metric(self.metric)
        self.combiner.check(self.metric, self.datastore.key_layer)

    @property
    def needs_text(self) -> bool:
        """Whether held-out text is needed to choose or measure anything."""
        return self.combiner.needs_tuning or self.index.kind != "flat"

    def check(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        train: Corpus | None,
        *,
        precision: Precision = Precision(),  # noqa: B008
        keys_change: bool = False,
    ) -> None:
        """Raises if `Retrieval.prepare` could not succeed; builds nothing.

        Worth calling before hours of training. Every rank calls this.

        Args:
            keys_change: Whether the model will be trained first, so that its present keys are not
                those that the datastore will hold.
        """

        def check_shape(num_entries: int, key_dim: int, builds: bool) -> None:
            check_k(self.combiner.least_entries, num_entries)
            self.index.check(num_entries, key_dim, self.metric)

        check_buildable(
            model,
            tokenizer,
            train,
            self.datastore,
            precision=precision,
            keys_change=keys_change,
            check=check_shape,
        )


@dataclass(frozen=True)
class Retrieval:
    """Everything that decoding with retrieval needs, ready for one model.

    Attributes:
        model_fingerprint: Of the model that makes the queries.
        output_digest: Of its output projection: a combiner fits it, a fingerprint ignores it.
        datastore: Of that model.
        measured_index: Over the datastore.
        fitted: The combiner.
        method: What decoding with it is called in reports.
    """

    model_fingerprint: str
    output_digest: str
    datastore: Datastore
    measured_index: MeasuredIndex
    fitted: FittedCombiner
    method: str

    @classmethod
    def prepare(
        cls,
        model: Transformer,
        tokenizer: Tokenizer,
        train: Corpus | None,
        valid: Corpus | None,
        plan: RetrievalPlan,
        *,
        precision: Precision = Precision(),  # noqa: B008
    ) -> Retrieval:
        """Builds or finds datastore, index and combiner for a model's present weights.

        What was built or chosen before for the same model, text and settings is used again. Every
        rank calls this.

        Args:
            model: Makes keys and queries.
            tokenizer: Made the ids of both texts.
            train: The text that is retrieved from; None to use the datastore in
                `plan.datastore.directory` alone.
            valid: Held-out text, on which the index is measured and the combiner chosen; None if
                `plan.needs_text` is false.
            plan: What to prepare.
            precision: The arithmetic of all passes.
        """
        datastore = ensure_datastore(model, tokenizer, train, plan.datastore, precision=precision)
        return cls.over(
            datastore,
            model,
            tokenizer,
            valid,
            plan.index,
            plan.combiner,
            plan.metric,
            precision=precision,
            max_tokens=plan.datastore.max_tokens,
        )

    @classmethod
    def over(
        cls,
        datastore: Datastore,
        model: Transformer,
        tokenizer: Tokenizer,
        valid: Corpus | None,
        index: IndexChoice,
        combiner: CombinerChoice,
        metric: Metric = "l2",
        *,
        precision: Precision = Precision(),  # noqa: B008
        max_tokens: int = 4096,
    ) -> Retrieval:
        """Builds or finds index and combiner for a datastore of the model's present weights.

        Every rank calls this. The arguments are `prepare`'s and `RetrievalPlan`'s.

        Raises:
            StaleDatastoreError: If another model or tokenizer made the datastore.
        """
        key_layer = datastore.manifest.key_layer
        ours = fingerprint(model, precision.name, key_layer)
        datastore.require(fingerprint=ours, tokenizer_digest=tokenizer.digest, key_layer=key_layer)
        text = TuningText(
            model,
            tokenizer,
            valid,
            datastore,
            index,
            metric,
            precision=precision,
            max_tokens=max_tokens,
        )
        fitted = combiner.fit(text)
        measured = text.index_for(fitted.combiner.num_neighbours)
        return cls(ours, output_digest(model), datastore, measured, fitted, combiner.method)

    def keys_fit(self, model: Transformer, precision: Precision) -> bool:
        """Whether the datastore is that of a model's present weights."""
        key_layer = self.datastore.manifest.key_layer
        return self.model_fingerprint == fingerprint(model, precision.name, key_layer)

    def fits(self, model: Transformer, precision: Precision) -> bool:
        """Whether it was prepared for a model's present weights, the output projection included."""
        return self.keys_fit(model, precision) and self.output_digest == output_digest(model)

    def distribution(self, base: SoftmaxDistribution) -> KNNDistribution:
        """The model's own distribution, mixed with that of the datastore."""
        combiner = self.fitted.combiner
        source = LocalSource(self.measured_index.index, self.datastore.values)
        key_layer = self.datastore.manifest.key_layer
        return KNNDistribution(
            base, Retriever(source, combiner.num_neighbours, key_layer), combiner
        )

    @property
    def num_bytes(self) -> int:
        """Keys, values and index."""
        return self.datastore.num_bytes + self.measured_index.index.num_bytes
