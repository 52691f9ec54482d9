"""The special ids of a vocabulary; nobody else writes them down."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vocabulary:
    """How many ids there are, and which of them are not text.

    Padding may share its id with the decoder's start: masks are made from labels and sources, where
    no start id occurs.

    Attributes:
        size: Number of ids, V; the rows of the embedding.
        pad_id: Fills the ends of shorter rows of a batch.
        start_id: The decoder's first input.
        eos_id: Ends every source and every target.
        unk_id: Stands for a symbol that the vocabulary lacks.
        target_prefix: What every target begins with, after the start id: the token of the target
            language in a multilingual model, usually nothing. Encoded targets have it, so a model
            learns and a datastore holds it like any token; search gives it to every hypothesis.
        source_size: Number of ids of a source with a vocabulary of its own; None where source and
            target share one.
    """

    size: int
    pad_id: int
    start_id: int
    eos_id: int
    unk_id: int
    target_prefix: tuple[int, ...] = ()
    source_size: int | None = None

    def __post_init__(self) -> None:
        """Rejects ids outside the vocabulary."""
        for name in ("pad_id", "start_id", "eos_id", "unk_id"):
            value = getattr(self, name)
            if not 0 <= value < self.size:
                raise ValueError(
                    f"{name} is {value}, outside the vocabulary's ids 0 to {self.size - 1}."
                )
        outside = [i for i in self.target_prefix if not 0 <= i < self.size]
        if outside:
            raise ValueError(
                f"target_prefix holds {outside[0]}, outside the vocabulary's ids 0 to "
                f"{self.size - 1}."
            )

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that carry no text: padding, start, end and a target's prefix."""
        return frozenset({self.pad_id, self.start_id, self.eos_id, *self.target_prefix})

    @property
    def never_emitted(self) -> tuple[int, ...]:
        """The ids that no output contains, ascending: unknown, padding and the decoder's start.

        The end is not among them even where it is also the start, as in fairseq's models.
        """
        return tuple(sorted({self.unk_id, self.pad_id, self.start_id} - {self.eos_id}))

    @property
    def largest_size(self) -> int:
        """Number of ids of the larger side: what an array of ids must be able to hold."""
        return max(self.size, self.source_size or 0)
