"""KNNCallback: when a datastore is built and when retrieval is on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch

from lightning_knnmt.models import KEY_LAYERS, KeyLayer, Transformer
from lightning_knnmt.retrieval import (
    Datastore,
    IndexChoice,
    MeasuredIndex,
    Metric,
    check_k,
    check_metric,
)
from lightning_knnmt.training.building import (
    datamodule_of,
    ensure_datastore,
    refuse_what_will_not_fit,
)
from lightning_knnmt.training.combiner_choice import CombinerChoice, ReadyCombiner
from lightning_knnmt.training.fingerprint import fingerprint
from lightning_knnmt.training.nmt import NMTModule
from lightning_knnmt.training.ranks import rank_zero_first
from lightning_knnmt.training.teacher_forcing import keys_from
from lightning_knnmt.training.validation import ValidationPass, require_queries, with_retrieval


@dataclass(frozen=True)
class Retrieval:
    """Everything that decoding with retrieval needs, ready for one model."""

    model_fingerprint: str
    output_digest: str  # of the output projection: a combiner fits it, a fingerprint ignores it
    datastore: Datastore
    measured_index: MeasuredIndex
    ready: ReadyCombiner

    @property
    def num_bytes(self) -> int:
        """Keys, values and index."""
        return self.datastore.num_bytes + self.measured_index.index.num_bytes


class KNNCallback(pl.Callback):
    """Builds the datastore after training, and decodes with it in validation and test.

    The model and its module know nothing of it: it replaces the module's next-token distribution
    at the start of an evaluation and puts the old one back at its end. A datastore whose
    fingerprint fits the weights is used again; during training the weights move, no fingerprint
    fits, and validation runs without retrieval.

    Attributes:
        enabled: Whether evaluation uses retrieval; off, the callback does nothing there.
        retrieval: What the last evaluation used; None before it.
    """

    def __init__(
        self,
        datastores: Path | str,
        index: IndexChoice,
        combiner: CombinerChoice,
        *,
        directory: Path | str | None = None,
        metric: Metric = "l2",
        rebuild: bool = False,
        key_layer: KeyLayer = "opl_input",
    ) -> None:
        """
        Args:
            datastores: Datastores are kept in this folder, one for each corpus and model.
            index: How an index is chosen.
            combiner: How a combiner is.
            directory: One datastore's own folder, to use as it is whatever it was built from, or to
                build if there is none; instead of a folder below `datastores`.
            metric: "l2" (squared) or "ip".
            rebuild: Build even if there is a datastore that fits.
            key_layer: Whose inputs the keys are: the output projection's, or the last decoder
                layer's feed-forward network's, as in the code of Khandelwal et al. (2021).
        """
        if key_layer not in KEY_LAYERS:
            raise ValueError(f"key_layer is {key_layer!r}; choose one of {', '.join(KEY_LAYERS)}.")
        check_metric(metric)
        combiner.check(metric, key_layer)
        self.datastores = Path(datastores)
        self.index_choice = index
        self.combiner_choice = combiner
        self.directory = None if directory is None else Path(directory)
        self.metric: Metric = metric
        self.rebuild = rebuild
        self.key_layer: KeyLayer = key_layer
        self.enabled = True
        self.retrieval: Retrieval | None = None
        self._fits = False  # what this run will build, as far as is known

    # Lightning's hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Before hours of training, or of decoding without retrieval, that a datastore which cannot
        # be built would end. Once a run: later, what was built has taken its room.
        if self._fits:
            return
        model, datamodule = _nmt_module(pl_module).model, datamodule_of(trainer)

        def check(num_entries: int, key_dim: int, builds: bool) -> None:
            check_k(self.combiner_choice.least_entries, num_entries)
            self.index_choice.check(num_entries, key_dim, self.metric)
            if self.combiner_choice.needs_validation_set:
                _ = datamodule.valid_corpus  # what is wrong with it is told before building
            elif builds and self.index_choice.kind != "flat":
                require_queries(datamodule)

        with keys_from(model, self.key_layer):
            refuse_what_will_not_fit(
                trainer,
                model,
                self.datastores,
                directory=self.directory,
                rebuild=self.rebuild,
                keys_change=stage == "fit" and keys_train(model),
                index=self.index_choice.kind,
                check=check,
            )
        self._fits = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not on_fit_end: by then the model has left its device. The weights at hand are the last,
        # while a test will load the best, so the datastore is built with those.
        module = _nmt_module(pl_module)
        with best_weights(trainer, module):
            self.ensure_datastore(trainer, module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = _nmt_module(pl_module)
        with keys_from(module.model, self.key_layer):
            ours = fingerprint(module.model, trainer.precision)
        fits = self.retrieval is not None and self.retrieval.model_fingerprint == ours
        if trainer.state.fn != "fit" or fits:
            self._attach(trainer, module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(trainer, _nmt_module(pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._detach(pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._detach(pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._detach(pl_module)

    # What they do

    def ensure_datastore(self, trainer: pl.Trainer, module: NMTModule) -> Datastore:
        """The datastore of the module's present weights, built if there is none that fits.

        Raises:
            StaleDatastoreError: If `directory` holds a datastore of another model, tokenizer or
                layer.
        """
        with keys_from(module.model, self.key_layer):
            datastore = ensure_datastore(
                trainer,
                module.model,
                self.datastores,
                directory=self.directory,
                rebuild=self.rebuild,
                index=self.index_choice.kind,
            )
        self.rebuild = False  # once is enough
        return datastore

    def prepare(self, trainer: pl.Trainer, module: NMTModule) -> Retrieval:
        """Datastore, index and combiner for the module's present weights, reused if they fit."""
        with keys_from(module.model, self.key_layer):
            return self._prepare(trainer, module)

    def _prepare(self, trainer: pl.Trainer, module: NMTModule) -> Retrieval:
        ours = fingerprint(module.model, trainer.precision)
        validation = ValidationPass(module, datamodule_of(trainer), trainer)
        output = validation.output_digest
        known = self.retrieval
        if known is not None and (known.model_fingerprint, known.output_digest) == (ours, output):
            return known
        if self.combiner_choice.needs_validation_set:
            _ = datamodule_of(trainer).valid_corpus  # what is wrong with it is told before building
        datastore = self.ensure_datastore(trainer, module)

        def index_for(k: int) -> MeasuredIndex:
            # Rank zero chooses and saves; the others then find its choice on the disk.
            return rank_zero_first(
                trainer,
                lambda: self.index_choice.ensure(datastore, self.metric, k, validation.queries),
            )

        ready = self.combiner_choice.ensure(datastore, index_for, validation)
        measured = index_for(ready.combiner.num_neighbours)
        self.retrieval = Retrieval(ours, output, datastore, measured, ready)
        return self.retrieval

    def _attach(self, trainer: pl.Trainer, module: NMTModule) -> None:
        if not self.enabled:
            return
        retrieval = self.prepare(trainer, module)
        module.next_token_distribution = with_retrieval(
            module.nmt_distribution,
            retrieval.datastore,
            retrieval.measured_index.index,
            retrieval.ready.combiner,
        )
        module.model.key_layer = self.key_layer

    def _detach(self, module: pl.LightningModule) -> None:
        module = _nmt_module(module)
        module.next_token_distribution = module.nmt_distribution
        module.model.key_layer = "opl_input"


@contextmanager
def best_weights(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """The best checkpoint's weights inside, the last ones outside; without one, the last."""
    best_path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not best_path:
        yield
        return
    last = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    best = torch.load(best_path, map_location="cpu", weights_only=True)["state_dict"]
    module.load_state_dict(best)
    try:
        yield
    finally:
        module.load_state_dict(last)


def keys_train(model: Transformer) -> bool:
    """Whether training changes the keys: whether more than the output projection trains."""
    return any(
        parameter.requires_grad
        for name, parameter in model.named_parameters()
        if not name.startswith("output_projection.")
    )


def _nmt_module(module: pl.LightningModule) -> NMTModule:
    if not isinstance(module, NMTModule):
        raise TypeError(
            f"KNNCallback works on an NMTModule, but was given a {type(module).__name__}."
        )
    return module
