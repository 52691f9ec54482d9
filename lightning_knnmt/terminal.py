"""What a person at the terminal reads: sentences, not tracebacks; no chatter of libraries."""

import logging
import os
import warnings

from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

from lightning_knnmt.retrieval.ranks import OtherRankError

# What users can cause: our own errors are ValueErrors, files bring OSErrors.
MISTAKES = (ValueError, OSError, MisconfigurationException, OmegaConfBaseException)
NO_CONCERN_OF_USERS = (
    # Lightning 2.6 still uses torch's old name for a leaf.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # Lightning would have many loader processes; ours reads a memory map.
    r"The '.*_dataloader' does not have many workers",
    # A small corpus has fewer batches than the logging interval: its epoch ends are logged.
    r"The number of training batches .* is smaller than the logging interval",
    # Lightning's summary counts bytes for some precisions only.
    r"Precision .* is not supported by the model summary",
    # OPLFineTuner trains without dropout on purpose.
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # train.py itself refuses to write over another run; what is left is resume=true.
    r"Checkpoint directory .* exists and is not empty",
)


def quieten_libraries() -> None:
    """Silences what a reader can do nothing about, and all but errors on ranks other than zero."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in NO_CONCERN_OF_USERS:
        warnings.filterwarnings("ignore", message)
    if getattr(rank_zero_only, "rank", 0):  # Lightning sets it, also in a child process
        logging.getLogger("lightning_knnmt").setLevel(logging.ERROR)


def explanation(error: BaseException) -> str:
    """What to print before the program ends with an error.

    Args:
        error: Whatever stopped the run.

    Returns:
        One sentence; nothing where another process prints it.

    Raises:
        The error itself, if it is not a user's mistake or HYDRA_FULL_ERROR asks for tracebacks.
    """
    if isinstance(error, OtherRankError):
        return ""
    if not isinstance(error, MISTAKES) or "HYDRA_FULL_ERROR" in os.environ:
        raise error
    sentence = str(error).strip()
    if isinstance(error, OmegaConfBaseException):
        sentence = sentence.splitlines()[0]  # the rest tells the type of the node
    return f"error: {sentence}\n(HYDRA_FULL_ERROR=1 shows where it came from)"
