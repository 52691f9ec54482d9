"""A trained combiner in one safetensors file: its weights, and in the metadata what it is.

The metadata are strings: the format, the variant, the constructor's arguments as JSON and, as JSON
too, the sources: everything that the caller names as an input of the training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_knnmt.files import replacing
from lightning_knnmt.retrieval.adaptive import AdaptiveCombiner, KNNBoxCombiner
from lightning_knnmt.retrieval.errors import CombinerError
from lightning_knnmt.retrieval.robust import RobustCombiner

FORMAT = "lightning_knnmt combiner 1"
TrainedCombiner = AdaptiveCombiner | KNNBoxCombiner | RobustCombiner
VARIANTS: dict[str, type[TrainedCombiner]] = {
    "adaptive": AdaptiveCombiner,
    "adaptive-knnbox": KNNBoxCombiner,
    "robust": RobustCombiner,
}


def save_combiner(combiner: TrainedCombiner, path: Path | str, sources: Mapping[str, str]) -> None:
    """Writes a combiner; the file is whole at every moment.

    Args:
        combiner: What to save.
        path: The file; its folder is created if necessary.
        sources: What the weights depend on, for `load_combiner` to compare.
    """
    (variant,) = (name for name, kind in VARIANTS.items() if type(combiner) is kind)
    metadata = {
        "format": FORMAT,
        "variant": variant,
        "settings": json.dumps(combiner.settings),
        "sources": json.dumps(dict(sources)),
    }
    tensors = {name: t.detach().contiguous() for name, t in combiner.state_dict().items()}
    with replacing(Path(path)) as partial:
        save_file(tensors, partial, metadata)


def load_combiner(
    path: Path | str,
    sources: Mapping[str, str] | None = None,
    *,
    num_neighbours: int | None = None,
) -> TrainedCombiner:
    """Reads what `save_combiner` wrote.

    Args:
        path: The file.
        sources: What the weights should depend on; None takes any.
        num_neighbours: The K that is needed; None takes any.

    Raises:
        CombinerError: If the file is damaged or no combiner, or K or a source is another.
    """
    path = Path(path)
    metadata, tensors = _read(path)
    try:
        settings: dict[str, Any] = json.loads(metadata["settings"])
        theirs: dict[str, str] = json.loads(metadata["sources"])
        # Under inference_mode, where this may run, parameters could never be trained again.
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            combiner = VARIANTS[metadata["variant"]](**settings)
            combiner.load_state_dict(tensors)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CombinerError(
            f"{path} is damaged: its metadata and weights do not make a combiner "
            f"({type(error).__name__}). Use another copy, or delete it and train again."
        ) from error
    trained_for = combiner.num_neighbours
    if num_neighbours is not None and trained_for != num_neighbours:
        raise CombinerError(
            f"The combiner in {path} was trained for k_max = {trained_for}, not {num_neighbours}: "
            f"retrieve {trained_for} neighbours, or train another for {num_neighbours}."
        )
    differing = sorted(key for key, value in (sources or {}).items() if theirs.get(key) != value)
    if differing:
        raise CombinerError(
            f"The combiner in {path} was trained from something else; these differ: "
            f"{', '.join(differing)}. Train it again."
        )
    return combiner


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file of ours."""
    if not path.is_file():
        raise CombinerError(
            f"There is no combiner at {path}: train one and save it, or give the file of another."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CombinerError(
            f"{path} cannot be read as safetensors ({error}): it is damaged, or something else. "
            "Use another copy, or delete it and train again."
        ) from error
    if metadata.get("format") != FORMAT:
        raise CombinerError(
            f"{path} holds {metadata.get('format', 'something unnamed')!r}, but only {FORMAT!r} "
            "can be loaded: give a file that save_combiner wrote."
        )
    return metadata, tensors
