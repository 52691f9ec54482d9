"""One teacher-forced pass over a corpus: every target token with the states that precede it.

Datastores, tuning and analyses all start from this pass (Khandelwal et al., 2021, section 2).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_knnmt.data import Batch, BatchDataset, Corpus, TokenBatchSampler, Vocabulary
from lightning_knnmt.models import DecoderStates, KeyLayer, Transformer, digest
from lightning_knnmt.retrieval.ranks import rank, world_size

# Settings of what comes after the key, or of training alone. Which matrices are one decides how
# they train, not what they compute: an untied copy makes the same keys.
NOT_IN_THE_KEY = (
    *("tied_embeddings", "output_bias"),
    *("dropout", "attention_dropout", "activation_dropout"),
)


class Precision(NamedTuple):
    """The arithmetic of a forward pass.

    Attributes:
        name: Lightning's name of it ("32-true", "bf16-mixed", ...).
        context: Opens it, as `torch.autocast` does.
    """

    name: str = "32-true"
    context: Callable[[], AbstractContextManager[None]] = nullcontext


class LabelledStates(NamedTuple):
    """The tokens of one batch, padding left out.

    Attributes:
        states: What the decoder returned before each token, [n, D] each.
        labels: The tokens, EOS included, [n].
        sentences: Each token's sentence, as its row in the corpus, [n]; a sentence's tokens are
            adjacent and in their order.
    """

    states: DecoderStates
    labels: Tensor
    sentences: Tensor


def batches_of(
    corpus: Corpus, vocabulary: Vocabulary, max_tokens: int, *, all_on_this_rank: bool = False
) -> Iterator[Batch]:
    """A corpus in batches, longest first; each pair comes once.

    Which sentences form a batch does not depend on the number of ranks.

    Args:
        max_tokens: Ids in a batch, padding included.
        all_on_this_rank: The whole corpus; else this rank's share of the batches.
    """
    sampler = TokenBatchSampler(
        corpus.source_lengths,
        corpus.target_lengths,
        max_tokens,
        rank=0 if all_on_this_rank else rank(),
        world_size=1 if all_on_this_rank else world_size(),
    )
    dataset = BatchDataset(corpus, vocabulary)
    return (dataset[rows] for rows in sampler)


@torch.inference_mode()
def teacher_forced(
    model: Transformer, batches: Iterable[Batch], precision: Precision
) -> Iterator[LabelledStates]:
    """Feeds every reference to the model and yields its labelled states.

    Args:
        model: Dropout is off during the pass; the mode it was in comes back afterwards.
        batches: In any order; they are moved to the model's device.
        precision: The pass's arithmetic.
    """
    device = next(model.parameters()).device
    with evaluating(model), precision.context():
        for batch in batches:
            batch = batch.to(device)
            mask = batch.label_mask  # [B, T]
            states = model(batch.source_ids, batch.decoder_input).select(mask)
            sentences = batch.index.unsqueeze(-1).expand_as(mask)[mask]
            yield LabelledStates(states, batch.labels[mask], sentences)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside, the mode as it was outside."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def fingerprint(
    model: Transformer, precision: str = "32-true", key_layer: KeyLayer = "opl_input"
) -> str:
    """Digest of everything that shapes a key: two models with one fingerprint make the same keys.

    The output projection comes after the key, so it is left out: tuning it alone keeps a datastore
    valid, while adapters or full fine-tuning change the fingerprint. The rule is bitwise.

    Args:
        model: The model that makes the keys.
        precision: Lightning's name of the arithmetic ("32-true", "bf16-mixed", ...), which changes
            the keys as much as a weight does.
        key_layer: Whose inputs the keys are.

    Returns:
        64 hexadecimal digits.
    """
    settings = {k: v for k, v in model.config.items() if k not in NOT_IN_THE_KEY}
    if key_layer != "opl_input":  # the default's fingerprints are older than the choice
        settings["key_layer"] = key_layer
    weights = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("output_projection.")
    }
    return digest([precision, settings], weights)
