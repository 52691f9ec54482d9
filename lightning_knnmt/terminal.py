"""How commands behave at a terminal: errors in one sentence, quiet libraries, kept memory."""

import ctypes
import difflib
import logging
import os
import sys
import warnings
from collections.abc import Iterable

UNIMPORTANT = (
    # Lightning 2.6 still uses torch's old name for a leaf.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # Lightning recommends many loader processes; ours reads a memory map.
    r"The '.*_dataloader' does not have many workers",
    # A small corpus has fewer batches than the logging interval; its epoch ends are logged.
    r"The number of training batches .* is smaller than the logging interval",
    # OPLFineTuner trains without dropout on purpose.
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # train.py itself protects another run's folder; what is left is resume=true.
    r"Checkpoint directory .* exists and is not empty",
)
# What users may call a setting.
SYNONYMS = {
    "batch_size": "max_tokens",
    "beam": "beam_size",
    "beams": "beam_size",
    "epochs": "max_epochs",
    "gpus": "devices",
    "k": "num_neighbours",
    "lambda": "knn_weight",
    "learning_rate": "lr",
    "neighbors": "num_neighbours",
    "num_neighbors": "num_neighbours",
    "steps": "max_steps",
    "t": "temperature",
}
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_ONE_GIB = 1 << 30


def quieten_libraries() -> None:
    """Silences messages that users cannot act on, and all but errors on ranks other than zero."""
    import pytorch_lightning  # noqa: F401  # sets the level of its logger when it is imported
    from lightning_utilities.core.rank_zero import rank_zero_only

    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in UNIMPORTANT:
        warnings.filterwarnings("ignore", message)
    if getattr(rank_zero_only, "rank", 0):  # Lightning sets it, also in a child process
        logging.getLogger("lightning_knnmt").setLevel(logging.ERROR)


def explanation(error: BaseException) -> str:
    """Returns what to print before the program ends with an error.

    Args:
        error: Whatever stopped the run.

    Returns:
        One sentence; nothing if another process prints it.

    Raises:
        BaseException: The error itself, if users cannot have caused it or HYDRA_FULL_ERROR asks for
            tracebacks.
    """
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from omegaconf.errors import OmegaConfBaseException

    from lightning_knnmt.retrieval.ranks import OtherRankError

    if isinstance(error, OtherRankError):
        return ""
    # Our own errors are ValueErrors, files bring OSErrors.
    causes = (ValueError, OSError, MisconfigurationException, OmegaConfBaseException)
    if not isinstance(error, causes) or "HYDRA_FULL_ERROR" in os.environ:
        raise error
    sentence = str(error).strip()
    if isinstance(error, OmegaConfBaseException):
        sentence = sentence.splitlines()[0]  # the rest describes OmegaConf's node
    return in_one_sentence(sentence)


def in_one_sentence(sentence: str) -> str:
    """The form in which every command's error is printed."""
    return f"error: {sentence}\n(HYDRA_FULL_ERROR=1 shows where it came from)"


def near_matches(wrong: str, known: Iterable[str]) -> list[str]:
    """Finds the settings that a user may have meant, best first.

    Args:
        wrong: A dotted name that is no setting.
        known: The dotted names of all settings.
    """
    known = list(known)
    parent, _, leaf = wrong.rpartition(".")
    meant = {leaf, SYNONYMS.get(leaf.lower(), leaf)}
    inside = [name for name in known if name.startswith(f"{parent}.")] if parent else []
    for among, cutoff in ((inside, 0.6), (known, 0.75)):
        by_leaf: dict[str, list[str]] = {}
        for name in among:
            by_leaf.setdefault(name.rpartition(".")[2], []).append(name)
        exact = [name for each in meant for name in by_leaf.get(each, ())]
        close = [
            name
            for each in difflib.get_close_matches(leaf, by_leaf, cutoff=cutoff)
            for name in by_leaf[each]
        ]
        if found := exact or close:
            return found[:3]
    return []


def keep_freed_memory() -> None:
    """Keeps up to 1 GiB of freed memory in glibc's pool; does nothing with another C library.

    By default every array of some MB is a mapping of its own, so that each decoding step
    page-faults again: about a fifth of the time of beam search. Peak memory stays the same; less of
    it is returned to the system afterwards.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _ONE_GIB)
        mallopt(_TRIM_THRESHOLD, _ONE_GIB)
