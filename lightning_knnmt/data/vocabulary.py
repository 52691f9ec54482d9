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
    """

    size: int
    pad_id: int
    start_id: int
    eos_id: int
    unk_id: int

    def __post_init__(self) -> None:
        """Refuses ids outside the vocabulary."""
        for name in ("pad_id", "start_id", "eos_id", "unk_id"):
            value = getattr(self, name)
            if not 0 <= value < self.size:
                raise ValueError(
                    f"{name} is {value}, outside the vocabulary's ids 0 to {self.size - 1}."
                )

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that carry no text: padding, start and end."""
        return frozenset({self.pad_id, self.start_id, self.eos_id})
