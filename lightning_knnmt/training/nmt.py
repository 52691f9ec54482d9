"""The Transformer NMT as a LightningModule: training and validation steps."""

import math
import os
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from lightning_knnmt.data import Batch, LabelledKeys, ParallelDataModule, Tokenizer
from lightning_knnmt.decoding import (
    BeamSearch,
    Hypothesis,
    NextTokenDistribution,
    SoftmaxDistribution,
    translate_batches,
)
from lightning_knnmt.evaluation.scoring import Bleu
from lightning_knnmt.models import DecoderStates, Transformer
from lightning_knnmt.pretrained import CheckpointError, check_fits, checkpoint_entry
from lightning_knnmt.training.divergence import (
    NonFiniteLossError,
    check_validation_loss,
    overflow_told,
    training_diverged,
)
from lightning_knnmt.training.projection_loss import projection_loss
from lightning_knnmt.training.settings import (
    Decay,
    Optimizer,
    check_learning_rate,
    check_settings,
    inverse_sqrt,
    linear,
    warn_of_smoothing,
)
from lightning_knnmt.training.trainable import Trainable, train_all


class CorpusBleu(Metric):
    """BLEU of the sentences of all ranks, counted as `evaluation.scoring` does."""

    full_state_update = False
    counts: Tensor

    def __init__(self, bleu: Bleu) -> None:
        super().__init__()
        self.bleu = bleu
        self.add_state("counts", torch.zeros(10, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, texts: list[str], references: list[str]) -> None:
        self.counts += torch.from_numpy(self.bleu.counts(texts, references).sum(axis=0))

    def compute(self) -> Tensor:
        return torch.tensor(float(self.bleu.from_counts(self.counts.cpu().numpy())))


class NMTModule(pl.LightningModule):
    """Trains a Transformer; fine-tuners are this class with other trainable parameters.

    Validation, test and prediction decode with the model's own distribution, or with the one that a
    callback has passed to `decode_with`.

    Attributes:
        method: The name of the way of training, for reports.
        nmt_distribution: The model's own distribution.
    """

    method: ClassVar[str] = "NMT"
    nmt_distribution: SoftmaxDistribution

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        search: BeamSearch,
        *,
        optimizer: Optimizer,
        trainable: Trainable = train_all,
        warmup_steps: int = 1000,
        decay: Decay = "inverse_sqrt",
        label_smoothing: float = 0.1,
        bleu_every: int = 1,
    ) -> None:
        """
        Args:
            model: Pretrained, or with fresh weights.
            tokenizer: The one that produces the model's ids.
            search: How test sets are translated.
            optimizer: Makes an optimizer of parameters; its learning rate is the schedule's peak.
            trainable: Decides which of the model's parameters train, and may insert adapters.
            warmup_steps: Steps in which the learning rate rises to its peak.
            decay: What follows: the inverse square root of the step ("inverse_sqrt"; constant
                without warm-up), or a straight line to zero at the last step ("linear").
            label_smoothing: Share of the target distribution spread over the vocabulary.
            bleu_every: Greedy BLEU in every n-th validation during training, and in every
                validation outside of it; 0 for never.
        """
        check_settings(warmup_steps, decay, label_smoothing, bleu_every)
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.search = search
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.decay = decay
        self.label_smoothing = label_smoothing
        self.bleu_every = bleu_every
        never = tokenizer.vocabulary.never_emitted
        self.nmt_distribution = SoftmaxDistribution(model.output_projection, never)
        self._distribution: NextTokenDistribution = self.nmt_distribution
        self._validations = 0
        self._loss = MeanMetric(nan_strategy="disable")  # of this validation, over tokens
        self._bleu: CorpusBleu | None = None  # of this validation, if it is scored, or test
        trainable(model)
        self.train()  # pretrained models come in evaluation mode, and Lightning would keep it

    # Training

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout depends on these four numbers alone, so that a resumed run repeats an
        # uninterrupted one exactly. Lightning's seed_everything sets the first.
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        numbers = (seed, self.global_rank, self.current_epoch, batch_idx)
        state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        mask = batch.label_mask
        hidden = self.model(batch.source_ids, batch.decoder_input).hidden[mask]  # [n, D]
        loss = self._smoothed_loss(hidden, batch.labels[mask])
        return self.checked_and_logged(loss, batch, batch_idx, len(hidden))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Lightning validates before it stops if should_stop is set, but not at max_steps.
        if self.global_step == self.trainer.max_steps:
            self.trainer.should_stop = True

    def checked_and_logged(
        self, loss: Tensor, batch: Batch | LabelledKeys, batch_idx: int, num_tokens: int
    ) -> Tensor:
        """Checks and logs the loss of a training step.

        Raises:
            NonFiniteLossError: On all ranks, if the loss of any rank is not finite.
        """
        finite = bool(torch.isfinite(loss))
        if not self.trainer.strategy.reduce_boolean_decision(finite, all=True):
            raise NonFiniteLossError(
                "This rank stops because another rank's training loss is not finite."
                if finite
                else training_diverged(self.trainer, loss, batch, batch_idx)
            )
        self.log("train_loss", loss, prog_bar=True)
        self.log("target_tokens", float(num_tokens), reduce_fx="mean")
        return loss

    def _smoothed_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Label-smoothed cross-entropy in nats a token; hidden [n, D], labels [n]."""
        smoothing = self.label_smoothing
        if smoothing and self.global_step == 0:
            with torch.no_grad():
                log_probs = self.nmt_distribution(DecoderStates(hidden))
            warn_of_smoothing(smoothing, -log_probs.mean().item(), log_probs.shape[-1])
        weight, bias = self.model.output_projection.weight, self.model.output_projection.bias
        return projection_loss(hidden, labels, weight, bias, label_smoothing=smoothing)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        check_learning_rate(self.optimizer)
        optimizer = self.optimizer(self.trained_parameters())
        factor = (
            linear(self.warmup_steps, self._last_step())
            if self.decay == "linear"
            else inverse_sqrt(self.warmup_steps)
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        with overflow_told(self.trainer, optimizer):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters for the optimizer."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _last_step(self) -> int:
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError(
                "decay=linear ends at the last step of a training, but this one has no end: set "
                "trainer.max_steps or trainer.max_epochs."
            )
        return int(steps)

    # Validation

    def on_validation_epoch_start(self) -> None:
        self._validations += not self.trainer.sanity_checking
        self._loss = MeanMetric(nan_strategy="disable").to(self.device)
        self._bleu = self._new_bleu() if self._scores_this_validation() else None

    def validation_step(self, batch: Batch | None, batch_idx: int) -> None:
        if batch is None:  # this rank has none
            return
        mask = batch.label_mask
        labels, rows = batch.labels[mask], mask.nonzero()[:, 0]
        session = self._distribution.begin(batch.source_ids, batch.source_mask, 1)
        log_probs = session(self.validation_states(batch, batch_idx), rows)
        self._loss.update(-log_probs.gather(-1, labels.unsqueeze(-1)))
        if self._bleu is not None:
            self._score(batch, BeamSearch(beam_size=1), "valid", self._bleu)

    def validation_states(self, batch: Batch, batch_idx: int) -> DecoderStates:
        """The states that precede the batch's tokens, [n, D] each."""
        states: DecoderStates = self.model(batch.source_ids, batch.decoder_input)
        return states.select(batch.label_mask)

    def on_validation_epoch_end(self) -> None:
        # The metrics gather from all ranks by themselves.
        loss = float(self._loss.compute())
        self.log("val_loss", loss, prog_bar=True, sync_dist=True)
        check_validation_loss(self.trainer, loss)
        if self._bleu is not None:
            self.log("val_bleu", self._bleu.compute(), prog_bar=True, sync_dist=True)

    def _scores_this_validation(self) -> bool:
        if self.bleu_every == 0 or self.trainer.sanity_checking:
            return False
        return self.trainer.state.fn == "validate" or self._validations % self.bleu_every == 0

    # Test and prediction

    def on_test_epoch_start(self) -> None:
        self._bleu = self._new_bleu()

    def test_step(self, batch: Batch | None, batch_idx: int) -> None:
        if batch is not None and self._bleu is not None:
            self._score(batch, self.search, "test", self._bleu)

    def on_test_epoch_end(self) -> None:
        if self._bleu is not None:
            self.log("test_bleu", self._bleu.compute(), sync_dist=True)

    def predict_step(self, batch: Batch | None, batch_idx: int) -> list[tuple[int, list[int]]]:
        """The row of each sentence and its best translation as token ids, EOS included."""
        if batch is None:
            return []
        best = self.translate(batch, self.search, self._distribution)
        return [(i, h.tokens) for i, h in zip(batch.index.tolist(), best, strict=True)]

    # Decoding

    @property
    def distribution(self) -> NextTokenDistribution:
        """What validation, test and prediction decode with."""
        return self._distribution

    def decode_with(self, distribution: NextTokenDistribution | None) -> None:
        """Lets validation, test and prediction decode with this; None for the model's own."""
        self._distribution = distribution or self.nmt_distribution

    def translate(
        self, batch: Batch, search: BeamSearch, next_token: NextTokenDistribution
    ) -> list[Hypothesis]:
        """The best hypothesis of each sentence of a batch."""
        found = translate_batches(
            self.model, self.tokenizer.vocabulary, [batch], search, next_token
        )
        return [hypotheses[0] for _, hypotheses in found]

    def _score(self, batch: Batch, search: BeamSearch, split: str, bleu: CorpusBleu) -> None:
        best = self.translate(batch, search, self._distribution)
        references = self._datamodule.references(split)
        bleu.update(
            [self.tokenizer.decode(each.tokens) for each in best],
            [references[i] for i in batch.index.tolist()],
        )

    @property
    def _datamodule(self) -> ParallelDataModule:
        datamodule: ParallelDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return datamodule

    def _new_bleu(self) -> CorpusBleu:
        data = self._datamodule
        return CorpusBleu(Bleu.for_language(data.target_lang, data.bleu_tokenizer)).to(self.device)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(checkpoint_entry(self.model, self.tokenizer))
        if text := self._training_text():
            checkpoint["training_text"] = text
        if "callbacks" not in checkpoint:  # weights only; but say by what score they were chosen
            callbacks = self.trainer.checkpoint_callbacks
            checkpoint["callbacks"] = {each.state_key: each.state_dict() for each in callbacks}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_fits(checkpoint, self.model, self.tokenizer)
        theirs, ours = checkpoint.get("training_text"), self._training_text()
        if theirs and ours and theirs != ours:
            raise CheckpointError(
                f"The checkpoint was trained on another text (digest {theirs[:12]}) than this "
                f"run's (digest {ours[:12]}), or the text was changed since: give the same text to "
                "continue the training, or start a new run."
            )

    def _training_text(self) -> str | None:
        """The digest of the text that this module trains on; None outside of a training."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if self.trainer.state.fn != "fit" or datamodule is None:
            return None
        digest: str = datamodule.train_corpus.digest
        return digest
