"""KNNCallback: when a datastore is built and when retrieval is on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_knnmt.data import Corpus, ParallelDataModule, Tokenizer, split_corpus
from lightning_knnmt.models import KeyLayer, Transformer
from lightning_knnmt.retrieval import (
    CombinerChoice,
    DatastorePlan,
    IndexChoice,
    LearnedCombiner,
    Metric,
    OtherText,
    Precision,
    Retrieval,
    RetrievalPlan,
    TunedCombiner,
    ensure_datastore,
)
from lightning_knnmt.retrieval.ranks import rank
from lightning_knnmt.retrieval.tuned import KINDS
from lightning_knnmt.training.nmt import NMTModule

HELD_OUT_SHARE, HELD_OUT_PAIRS = 0.1, 1000  # at most, of training text, without validation text
logger = logging.getLogger(__name__)


class KNNCallback(pl.Callback):
    """Builds the datastore after training, and decodes with it in validation.

    A shell around `Retrieval.prepare`: it says when, and for which of Lightning's loops. A
    datastore whose fingerprint fits the weights is used again; during training the weights move, no
    fingerprint fits, and validation runs without retrieval.

    Attributes:
        plan: What is prepared.
        retrieval: What was last prepared; None before.
    """

    def __init__(self, plan: RetrievalPlan) -> None:
        self.plan = plan
        self.retrieval: Retrieval | None = None
        self._checked = False
        self._held_out = False  # whether it was said that text is held out

    @property
    def method(self) -> str:
        """What decoding with retrieval is called in reports."""
        return self.plan.combiner.method

    # Lightning's hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Before hours of training that a datastore which cannot be built would end.
        if isinstance(pl_module, NMTModule):
            self._check(
                pl_module.model,
                pl_module.tokenizer,
                datamodule_of(trainer),
                precision_of(trainer),
                keys_change=stage == "fit" and keys_train(pl_module.model),
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not on_fit_end: by then the model has left its device. The weights at hand are the last,
        # while a test will load the best, so the datastore is built with those.
        module = _nmt_module(pl_module)
        train, _ = self._texts(datamodule_of(trainer))
        with best_weights(trainer, module):
            ensure_datastore(
                module.model,
                module.tokenizer,
                train,
                self.plan.datastore,
                precision=precision_of(trainer),
            )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = _nmt_module(pl_module)
        fits = self.retrieval is not None and self.retrieval.keys_fit(
            module.model, precision_of(trainer)
        )
        if trainer.state.fn != "fit" or fits:
            self._attach(trainer, module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, NMTModule):  # others say themselves how they decode
            self._attach(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(trainer, _nmt_module(pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _nmt_module(pl_module).decode_with(None)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, NMTModule):
            pl_module.decode_with(None)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _nmt_module(pl_module).decode_with(None)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(pl_module, NMTModule):
            pl_module.decode_with(None)

    # What they do

    def _attach(self, trainer: pl.Trainer, module: NMTModule) -> None:
        retrieval = self.prepare(
            module.model, module.tokenizer, datamodule_of(trainer), precision_of(trainer)
        )
        module.decode_with(retrieval.distribution(module.nmt_distribution))

    def prepare(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        datamodule: ParallelDataModule,
        precision: Precision = Precision(),  # noqa: B008  # immutable
    ) -> Retrieval:
        """Datastore, index and combiner for a model's present weights; every rank calls this.

        What was prepared last is used again if it fits them.

        Raises:
            DatastoreError: If they cannot be made; see `Retrieval.prepare`.
        """
        if self.retrieval is None or not self.retrieval.fits(model, precision):
            self._check(model, tokenizer, datamodule, precision)
            train, valid = self._texts(datamodule)
            self.retrieval = Retrieval.prepare(
                model,
                tokenizer,
                train,
                valid,
                self.plan,
                precision=precision,
            )
        return self.retrieval

    def _check(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        datamodule: ParallelDataModule,
        precision: Precision,
        keys_change: bool = False,
    ) -> None:
        """Once a run: later, what was built has taken its room."""
        if not self._checked:
            train, _ = self._texts(datamodule)
            self.plan.check(model, tokenizer, train, precision=precision, keys_change=keys_change)
            self._checked = True

    def _texts(self, datamodule: ParallelDataModule) -> tuple[Corpus | None, Corpus | None]:
        """The text that is retrieved from, and the one that choices are made on.

        Without validation text, a share of the training text is held out for the choices.
        """
        train = datamodule.train_corpus if datamodule.has("train") else None
        if not self.plan.needs_text:
            return train, None
        if train is None or datamodule.has("valid"):
            return train, datamodule.valid_corpus
        stored, valid = split_corpus(train, min(HELD_OUT_SHARE, HELD_OUT_PAIRS / len(train)))
        if rank() == 0 and not self._held_out:
            logger.info(
                "There is no validation text: %s of %s training pairs are held out of the "
                "datastore and used to choose index and combiner.",
                f"{len(valid):,}",
                f"{len(train):,}",
            )
        self._held_out = True
        return stored, valid


def knn_callback(
    combiner: str,
    datastores: Path | str,
    index: IndexChoice,
    *,
    directory: Path | str | None = None,
    metric: Metric = "l2",
    rebuild: bool = False,
    key_layer: KeyLayer = "opl_input",
    other_text: OtherText = "reject",
    max_tokens: int = 4096,
    **settings: Any,
) -> KNNCallback:
    """A KNNCallback from flat settings, as conf/knn/ and the command line have them.

    Args:
        combiner: A kind of `TunedCombiner` or a variant of `LearnedCombiner`.
        datastores: See `DatastorePlan`, as for the settings from `directory` to `max_tokens`.
        index: How an index is chosen.
        metric: "l2" (squared) or "ip".
        settings: The combiner's own.
    """
    choice: CombinerChoice = (
        TunedCombiner.of(combiner, **settings)
        if combiner in KINDS
        else LearnedCombiner(combiner, **settings)
    )
    datastore = DatastorePlan(
        Path(datastores),
        None if directory is None else Path(directory),
        rebuild,
        key_layer,
        other_text,
        index.kind,
        max_tokens,
    )
    return KNNCallback(RetrievalPlan(datastore, index, choice, metric))


def precision_of(trainer: pl.Trainer) -> Precision:
    """The trainer's arithmetic."""
    return Precision(str(trainer.precision), trainer.precision_plugin.forward_context)


@contextmanager
def best_weights(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """The best checkpoint's weights inside, the last ones outside; without one, the last."""
    last = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    load_best_weights(trainer, module)
    try:
        yield
    finally:
        module.load_state_dict(last)


def load_best_weights(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Gives the module the weights of the best checkpoint; without one it keeps the last."""
    if path := getattr(trainer.checkpoint_callback, "best_model_path", ""):
        best = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        module.load_state_dict(best)


def keys_train(model: Transformer) -> bool:
    """Whether training changes the keys: whether more than the output projection trains."""
    return any(
        parameter.requires_grad
        for name, parameter in model.named_parameters()
        if not name.startswith("output_projection.")
    )


def datamodule_of(trainer: pl.Trainer) -> ParallelDataModule:
    """The trainer's text."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(datamodule, ParallelDataModule):
        raise TypeError(
            f"A datastore is made of a ParallelDataModule's text, but the trainer has a "
            f"{type(datamodule).__name__}: pass datamodule=ParallelDataModule(...)."
        )
    return datamodule


def _nmt_module(module: pl.LightningModule) -> NMTModule:
    if not isinstance(module, NMTModule):
        raise TypeError(
            f"KNNCallback works on an NMTModule, but was given a {type(module).__name__}."
        )
    return module
