"""The checks of a datastore (Khandelwal et al., 2021, arXiv:2010.00710); each returns a finding."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lightning_knnmt.doctor.checks import Finding
from lightning_knnmt.models import KeyLayer
from lightning_knnmt.retrieval import (
    Datastore,
    DatastoreTooLargeError,
    FixedCombiner,
    Neighbours,
    Record,
    StaleDatastoreError,
    available_memory,
    reject_if_too_large,
)
from lightning_knnmt.retrieval.tuning import SPREADS, score_grid, temperatures_for

TIGHT = 0.5  # of the available memory
KNN_WEIGHTS = (0.1, 0.3, 0.5, 0.7)
FEW_RIGHT, HARDLY_ANY_RIGHT = 0.25, 0.1  # of the nearest neighbours
INSIDE = 0.5  # share of tokens whose own state is stored
ROUNDING = 1e-3  # of the spread of distances: nearer states differ by rounding only
BEYOND_GRID = 4.0  # times the largest or below the smallest temperature that tuning would try
LAYERS = {"opl_input": "output projection", "ffn_input": "last feed-forward network"}
SAME_KEY = 0.01  # relative difference that float16 and other arithmetic leave


def check_size(
    directory: Path, num_entries: int, key_dim: int, seconds_per_entry: float
) -> Finding:
    """What the datastore of the whole training text takes.

    Args:
        directory: Where datastores are kept.
        num_entries: Entries of the whole training text.
        key_dim: D.
        seconds_per_entry: Measured on a part of the text.
    """
    try:
        estimate = reject_if_too_large(directory, num_entries, key_dim)
    except DatastoreTooLargeError as error:
        return Finding("size", "problem", str(error))
    memory = available_memory()
    text = (
        f"the whole training text gives {num_entries:,} entries with {key_dim} dimensions: "
        f"{_bytes(estimate.disk_bytes)} on disk, at most {_bytes(estimate.memory_bytes)} of the "
        f"{_bytes(memory)} of available memory, about "
        f"{_duration(num_entries * seconds_per_entry)} to build"
    )
    if estimate.memory_bytes > TIGHT * memory:
        return Finding("size", "warning", f"{text}: close other programs first.")
    return Finding("size", "ok", f"{text}.")


def check_fingerprint(datastore: Datastore, fingerprint: str, tokenizer_digest: str) -> Finding:
    """Whether this model and tokenizer made the datastore."""
    try:
        datastore.require(
            fingerprint=fingerprint,
            tokenizer_digest=tokenizer_digest,
            key_layer=datastore.manifest.key_layer,  # any will do, if the model's is the same
        )
    except StaleDatastoreError as error:
        return Finding("fingerprint", "problem", str(error))
    return Finding(
        "fingerprint",
        "ok",
        f"{len(datastore):,} entries of {datastore.manifest.corpus_name}, made by this model.",
    )


def check_key_layer(stored: Tensor, ours: Tensor, key_layer: KeyLayer = "opl_input") -> Finding:
    """Whether keys are the inputs, in this model, of the layer that the datastore names.

    Args:
        stored: Keys of some training tokens, [n, D].
        ours: The model's keys of the same tokens, [n, D].
        key_layer: The layer.
    """
    layer = LAYERS[key_layer]
    if stored.shape != ours.shape:
        return Finding(
            "key layer",
            "problem",
            f"Keys have {stored.shape[1]} dimensions, but the input of this model's {layer} has "
            f"{ours.shape[1]}: they come from another model or layer. Rebuild the datastore.",
        )
    difference = float((stored.float() - ours).norm() / ours.norm())
    text = f"keys differ by {difference:.2%} from the inputs of the {layer}"
    if difference > SAME_KEY:
        advice = "they come from other weights, another layer or other text. Rebuild the datastore"
        return Finding("key layer", "problem", f"{text}: {advice}.")
    return Finding("key layer", "ok", f"{text}.")


def check_nearest(record: Record) -> Finding:
    """How often the nearest neighbour's token is right, and how near it is."""
    found = record.distances[:, 0].isfinite()
    right = float((found & (record.tokens[:, 0] == record.gold)).float().mean())
    nearest = record.distances[found, 0]
    median = float(nearest.median()) if len(nearest) else float("nan")
    unit = temperatures_for(record)[SPREADS.index(1)]
    inside = float((nearest <= ROUNDING * unit).float().mean()) if len(nearest) else 0.0
    text = (
        f"the nearest neighbour's token is right for {right:.1%} of the held-out tokens; median "
        f"distance {median:.3g}"
    )
    if right < HARDLY_ANY_RIGHT:
        advice = "the datastore's keys or values are not this model's, or its text is unrelated"
        return Finding("neighbours", "problem", f"{text}: {advice}.")
    if inside > INSIDE:
        advice = "are in the datastore themselves, so this text is not held out"
        return Finding("neighbours", "warning", f"{text}; {inside:.0%} {advice}.")
    if right < FEW_RIGHT:
        return Finding("neighbours", "warning", f"{text}: the datastore's text is rather unlike.")
    return Finding("neighbours", "ok", f"{text}.")


def best_setting(record: Record) -> FixedCombiner:
    """The k, λ and T of a small grid that make the recorded text most probable."""
    ks = [k for k in (1, 2, 4, 8) if k <= record.max_neighbours]
    return score_grid(record, ks, KNN_WEIGHTS, temperatures_for(record)).best


def gold_probs(record: Record, setting: FixedCombiner) -> Tensor:
    """(1 - λ) p_NMT(gold) + λ p_kNN(gold) of every recorded token, [M]."""
    k = setting.num_neighbours
    neighbours = Neighbours(
        record.tokens[:, :k].long(), record.distances[:, :k], record.entries[:, :k]
    )
    probs, weight = setting(neighbours)
    knn_probs = (probs * (neighbours.tokens == record.gold[:, None])).sum(dim=-1)
    return torch.lerp(record.gold_log_probs.exp(), knn_probs, weight.squeeze(-1))


def check_gold(record: Record, setting: FixedCombiner) -> Finding:
    """What retrieval makes of p(gold), judged by its logarithm."""
    alone, mixed = record.gold_log_probs.exp(), gold_probs(record, setting)
    text = (
        f"mean p(gold) is {alone.mean():.3f} without retrieval, {mixed.mean():.3f} with it; mean "
        f"log p(gold) {alone.log().mean():.2f} and {mixed.log().mean():.2f} ({setting})"
    )
    if mixed.log().mean() <= alone.log().mean():
        return Finding("p(gold)", "warning", f"{text}: retrieval from this text does not help.")
    return Finding("p(gold)", "ok", f"{text}.")


def check_temperature(
    record: Record, suggested: FixedCombiner, temperature: float | None
) -> Finding:
    """Whether a temperature fits the distances."""
    tried = temperatures_for(record)
    advice = f"{suggested.temperature:g} suits these distances ({min(tried):g} to {max(tried):g})"
    if temperature is None:
        return Finding("temperature", "ok", f"{advice}.")
    text = f"{temperature:g} was given; {advice}"
    if temperature < min(tried) / BEYOND_GRID:
        effect = "so low that only the nearest neighbour counts"
        return Finding("temperature", "problem", f"{text}: {effect}.")
    if temperature > max(tried) * BEYOND_GRID:
        effect = "so high that all neighbours count the same, however far"
        return Finding("temperature", "problem", f"{text}: {effect}.")
    if min(tried) <= temperature <= max(tried):
        return Finding("temperature", "ok", f"{text}.")
    return Finding("temperature", "warning", f"{text}: tuning would not try it.")


def _bytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
