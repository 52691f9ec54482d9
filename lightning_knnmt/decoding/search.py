"""The settings of a beam search, kept apart from the search so that a config file can name them."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_knnmt.data import Batch, Vocabulary
from lightning_knnmt.decoding.beam_search import Hypothesis, IncrementalDecoder, beam_search
from lightning_knnmt.decoding.distribution import NextTokenDistribution
from lightning_knnmt.models import Transformer


@dataclass(frozen=True)
class BeamSearch:
    """How to decode: calling it translates one batch.

    Attributes:
        beam_size: Hypotheses kept for each sentence; 1 is greedy decoding.
        length_penalty: Hypotheses are ranked by their log-probability over length to this power.
        min_length: Fewest tokens before the end-of-sentence token.
        max_length_ratio: The longest hypothesis, in target tokens for each source token ...
        max_length_offset: ... plus this many.
    """

    beam_size: int = 4
    length_penalty: float = 1.0
    min_length: int = 0
    max_length_ratio: float = 2.0
    max_length_offset: int = 10

    def __post_init__(self) -> None:
        if type(self.beam_size) is not int or self.beam_size < 1:
            raise ValueError(
                f"beam_size is {self.beam_size!r}; it must be a whole number, at least 1 (greedy "
                "decoding)."
            )
        for name in ("min_length", "max_length_offset"):
            if type(value := getattr(self, name)) is not int:
                raise ValueError(f"{name} is {value!r}; it must be a whole number.")
        for name in ("length_penalty", "max_length_ratio"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"{name} is {value!r}; it must be a number.")

    def __call__(
        self,
        model: IncrementalDecoder,
        source_ids: Tensor,
        source_mask: Tensor,
        next_token: NextTokenDistribution,
        *,
        start_id: int,
        eos_id: int,
        max_positions: int,
        prefix: Sequence[int] = (),
    ) -> list[list[Hypothesis]]:
        """Translates a batch.

        Args:
            source_ids: [B, S].
            source_mask: True at tokens, [B, S].
            next_token: Turns decoder states into the next token's distribution.
            max_positions: The model's own bound on a target's length.
            prefix: Tokens that every hypothesis begins with.

        Returns:
            The finished hypotheses of each sentence, best first.
        """
        source_lengths = source_mask.sum(-1)
        max_length = (self.max_length_ratio * source_lengths + self.max_length_offset).long()
        with torch.inference_mode():
            return beam_search(
                model,
                source_ids,
                next_token,
                source_mask=source_mask,
                start_id=start_id,
                eos_id=eos_id,
                beam_size=self.beam_size,
                min_length=self.min_length,
                max_length=max_length.clamp(max=max_positions),
                length_penalty=self.length_penalty,
                prefix=prefix,
            )


def translate_batches(
    model: Transformer,
    vocabulary: Vocabulary,
    batches: Iterable[Batch],
    search: BeamSearch,
    distribution: NextTokenDistribution,
) -> Iterator[tuple[int, list[Hypothesis]]]:
    """Translates encoded sentences, batch by batch.

    Args:
        model: In evaluation mode; batches are moved to its device.
        vocabulary: The target's special ids.
        batches: Only their sources are read.
        search: How to decode.
        distribution: The model's own, or one that retrieval has a part in.

    Yields:
        Each sentence's row in its corpus (`Batch.index`) and its hypotheses, best first, in the
        order of the batches; `dict` makes them a table by row.
    """
    device = next(model.parameters()).device
    for batch in batches:
        on_device = batch.to(device)
        hypotheses = search(
            model,
            on_device.source_ids,
            on_device.source_mask,
            distribution,
            start_id=vocabulary.start_id,
            eos_id=vocabulary.eos_id,
            max_positions=model.max_positions,
            prefix=vocabulary.target_prefix,
        )
        yield from zip(batch.index.tolist(), hypotheses, strict=True)
