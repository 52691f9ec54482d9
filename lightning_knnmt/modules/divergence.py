"""Training that has diverged, told by the lines of text that it happened on."""

import numpy as np

from lightning_knnmt.data import Batch, Corpus, LabelledKeys

LINES_SHOWN = 5


class NonFiniteLossError(ValueError):
    """Training has diverged, or the text or the numbers that it met cannot be trained on."""


def origin(batch: Batch | LabelledKeys, corpus: Corpus) -> str:
    """The lines that a batch is made of, for people.

    Args:
        batch: Sentences of the corpus, or entries of a datastore that was built from it.
        corpus: The training text.
    """
    if isinstance(batch, LabelledKeys):
        entries = batch.entries.cpu().numpy()
        rows = np.unique(np.searchsorted(corpus.target_offsets, entries, "right") - 1).tolist()
    else:
        rows = sorted(batch.index.tolist())
    lines = sorted(corpus.line_numbers(rows))
    shown = ", ".join(map(str, lines[:LINES_SHOWN]))
    more = f" and {len(lines) - LINES_SHOWN:,} more" if len(lines) > LINES_SHOWN else ""
    return f"lines {shown}{more} of {corpus.source_path} and its translation"
