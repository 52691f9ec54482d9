"""One teacher-forced pass over a corpus: every target token with the hidden state that precedes it.

Datastores, tuning and analyses all start from this pass (Khandelwal et al., 2021, section 2).
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_knnmt.data import Batch
from lightning_knnmt.models import KeyLayer, Transformer


class LabelledHidden(NamedTuple):
    """The tokens of one batch, padding left out.

    Attributes:
        hidden: What the output projection sees before each token, [n, D]; with the model's
            `key_layer` set to another, the keys follow, [n, 2 D].
        labels: The tokens, EOS included, [n].
        sentences: Each token's sentence, as its row in the corpus, [n].
        positions: Each token's place in its sentence, from 0, [n].
    """

    hidden: Tensor
    labels: Tensor
    sentences: Tensor
    positions: Tensor


@torch.inference_mode()
def teacher_forced(
    model: Transformer,
    batches: Iterable[Batch],
    precision: AbstractContextManager[None],
) -> Iterator[LabelledHidden]:
    """Feeds every reference to the model and yields its labelled hidden states.

    Args:
        model: Dropout is off during the pass; the mode it was in comes back afterwards.
        batches: In any order; they are moved to the model's device.
        precision: The trainer's arithmetic, as a context.
    """
    device = next(model.parameters()).device
    with evaluating(model), precision:
        for batch in batches:
            batch = batch.to(device)
            mask = batch.label_mask  # [B, T]
            hidden = model(batch.source_ids, batch.decoder_input)[mask]  # [n, D]
            positions = torch.arange(mask.shape[1], device=device).expand_as(mask)
            yield LabelledHidden(
                hidden,
                batch.labels[mask],
                batch.index.unsqueeze(-1).expand_as(mask)[mask],
                positions[mask],
            )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off inside, the mode as it was outside."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def keys_from(model: Transformer, key_layer: KeyLayer) -> Iterator[None]:
    """The keys are another layer's inputs inside, and what they were outside."""
    before = model.key_layer
    model.key_layer = key_layer
    try:
        yield
    finally:
        model.key_layer = before
