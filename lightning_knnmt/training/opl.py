"""Fine-tuning of the output projection layer (OPL), W_O: through the model, or on its datastore.

A datastore's keys are the OPL's inputs and its values the labels, so training on it needs neither
the rest of the model nor the text. M entries, n in a batch, D the model's width, V the vocabulary,
R rows that train.
"""

from collections.abc import Callable
from typing import Any, Literal, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from lightning_knnmt.data import Batch, LabelledKeys, Tokenizer
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.models import DecoderStates, Transformer
from lightning_knnmt.models.linear import linear
from lightning_knnmt.training.nmt import NMTModule
from lightning_knnmt.training.projection_loss import FrozenMass, projection_loss
from lightning_knnmt.training.settings import Settings, for_fine_tuning
from lightning_knnmt.training.trainable import train_output_projection

CHUNK = 256  # entries


class SeenRows:
    """The rows of W_O whose tokens occur as labels, as separate parameters; the others are frozen.

    Attributes:
        weight: [R, D].
        bias: [R], or None.
    """

    def __init__(self, projection: nn.Linear, tokens: Tensor) -> None:
        """
        Args:
            projection: W_O, [V, D].
            tokens: Those that occur, without repetition, [R].
        """
        self._projection = projection
        self._tokens = tokens
        frozen = torch.ones(projection.out_features, dtype=torch.bool, device=tokens.device)
        frozen[tokens] = False
        self._row_of = (~frozen).cumsum(0) - 1  # [V], meaningful for `tokens` only
        weight, bias = projection.weight.detach(), projection.bias
        self.weight = nn.Parameter(weight[tokens])
        self.bias = nn.Parameter(bias.detach()[tokens]) if bias is not None else None
        self._frozen_weight = weight[frozen]
        self._frozen_bias = (
            bias.detach()[frozen] if bias is not None else weight.new_zeros(int(frozen.sum()))
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def labels(self, tokens: Tensor) -> Tensor:
        """The rows of tokens that occur, [n]."""
        return self._row_of[tokens]

    def log_mass(self, hidden: Tensor) -> Tensor:
        """Log of the sum of the frozen rows' exponentiated logits, [n, D] -> [n]."""
        if len(self._frozen_weight) == 0:
            return hidden.new_full((len(hidden),), -torch.inf)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        parts = torch.split(hidden, CHUNK)
        logits = (linear(part, self._frozen_weight, self._frozen_bias) for part in parts)
        return torch.cat([each.to(dtype).logsumexp(1) for each in logits])

    def frozen(self, hidden: Tensor, log_mass: Tensor) -> FrozenMass:
        """The frozen rows' share in the softmax of hidden states, [n, D] and [n]."""
        logit_sum = hidden @ self._frozen_weight.sum(0) + self._frozen_bias.sum()
        return FrozenMass(log_mass, logit_sum, len(self._frozen_weight))

    @torch.no_grad()
    def write_back(self) -> None:
        """Copies the rows into W_O, which validation and checkpoints read."""
        self._projection.weight.index_copy_(0, self._tokens, self.weight)
        if self.bias is not None:
            self._projection.bias.index_copy_(0, self._tokens, self.bias)


class OPLFineTuner(NMTModule):
    """Trains the output projection layer alone: the explicit counterpart of kNN-MT.

    The batches decide what it trains on: text, through the model, or a datastore's entries.
    """

    method = "OPL"

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        search: BeamSearch,
        *,
        rows: Literal["all", "seen"] = "all",
        **settings: Unpack[Settings],
    ) -> None:
        """
        Args:
            rows: Which rows of W_O train: all, or those of tokens that occur in the training text.
                Training could only lower the other rows' logits. As constants they cost nothing:
                their share of an entry's softmax is computed once.
            settings: Passed on to `NMTModule`. The defaults are those of fine-tuning: no warm-up
                and no label smoothing.
        """
        if rows not in ("all", "seen"):
            raise ValueError(f"rows is {rows!r}; choose one of all, seen.")
        settings = for_fine_tuning(settings)
        super().__init__(model, tokenizer, search, trainable=train_output_projection, **settings)
        self.model.eval()  # without dropout, W_O's inputs are exactly the keys of a datastore
        self.rows = rows
        self._seen_rows: SeenRows | None = None
        self._log_mass = torch.empty(0)  # of each entry, [M]; NaN where not yet computed
        self._validation_states: dict[int, DecoderStates] = {}

    def trained_parameters(self) -> list[nn.Parameter]:
        if self.rows == "all":
            return super().trained_parameters()
        if self.trainer.world_size > 1:
            raise ValueError(
                f"rows=seen trains in one process, but there are {self.trainer.world_size}: "
                "set trainer.devices=1, or rows=all."
            )
        targets = self.trainer.datamodule.train_corpus.target_tokens  # type: ignore[attr-defined]
        tokens = torch.from_numpy(np.unique(targets).astype(np.int64)).to(self.device)
        self._seen_rows = SeenRows(self.model.output_projection, tokens)
        self._log_mass = torch.full((len(targets),), torch.nan, device=self.device)
        return self._seen_rows.parameters

    # Training

    def training_step(self, batch: Batch | LabelledKeys, batch_idx: int) -> Tensor:
        if isinstance(batch, Batch) and self._seen_rows is None:
            return super().training_step(batch, batch_idx)
        projection = self.model.output_projection
        hidden, labels = self._hidden_and_labels(batch)
        if self._seen_rows is None:
            loss = projection_loss(
                hidden,
                labels,
                projection.weight,
                projection.bias,
                label_smoothing=self.label_smoothing,
            )
        else:
            entries = batch.entries if isinstance(batch, LabelledKeys) else None
            loss = projection_loss(
                hidden,
                self._seen_rows.labels(labels),
                self._seen_rows.weight,
                self._seen_rows.bias,
                label_smoothing=self.label_smoothing,
                frozen=self._seen_rows.frozen(hidden, self._frozen_log_mass(hidden, entries)),
            )
        return self.checked_and_logged(loss, batch, batch_idx, len(labels))

    @torch.no_grad()
    def _hidden_and_labels(self, batch: Batch | LabelledKeys) -> tuple[Tensor, Tensor]:
        """[n, D] and [n]."""
        if isinstance(batch, LabelledKeys):
            return batch.keys.to(self.model.output_projection.weight.dtype), batch.labels
        mask = batch.label_mask
        hidden = self.model(batch.source_ids, batch.decoder_input).hidden[mask]
        return hidden, batch.labels[mask]

    @torch.no_grad()
    def _frozen_log_mass(self, hidden: Tensor, entries: Tensor | None) -> Tensor:
        """`SeenRows.log_mass`; for a datastore's entries computed once, in the first epoch."""
        assert self._seen_rows is not None, "only seen rows train"
        if entries is None:
            return self._seen_rows.log_mass(hidden)
        if self._log_mass[entries].isnan().any():
            self._log_mass[entries] = self._seen_rows.log_mass(hidden).to(self._log_mass)
        return self._log_mass[entries]

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self._seen_rows is not None:
            self._seen_rows.write_back()

    # Validation: while only W_O trains, its hidden states stay the same

    def on_fit_start(self) -> None:
        self._validation_states.clear()

    def on_fit_end(self) -> None:
        self._validation_states.clear()
        self._seen_rows, self._log_mass = None, torch.empty(0)

    def validation_states(self, batch: Batch, batch_idx: int) -> DecoderStates:
        if self.trainer.state.fn != "fit":
            return super().validation_states(batch, batch_idx)
        if batch_idx not in self._validation_states:
            self._validation_states[batch_idx] = super().validation_states(batch, batch_idx)
        return self._validation_states[batch_idx]
