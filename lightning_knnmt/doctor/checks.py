"""The single checks: each takes numbers or lines and returns a finding."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_knnmt.data import Tokenizer
from lightning_knnmt.evaluation.scoring import Bleu
from lightning_knnmt.models import KeyLayer, Transformer
from lightning_knnmt.retrieval import (
    Datastore,
    DatastoreTooLargeError,
    FixedCombiner,
    Neighbours,
    Record,
    StaleDatastoreError,
    available_memory,
    refuse_if_too_large,
)
from lightning_knnmt.retrieval.tuning import SPREADS, Setting, score_grid, temperatures_for

Verdict = Literal["ok", "warning", "problem"]


class Finding(NamedTuple):
    """The answer of one check.

    Attributes:
        name: What was looked at, in a word or two.
        verdict: "problem" if translating or retrieving cannot be right, "warning" if it may not be.
        text: What was found and, unless it is well, what to do.
    """

    name: str
    verdict: Verdict
    text: str


def graded(value: float, warning: float, problem: float) -> Verdict:
    """The verdict on a number of which more is worse."""
    return "problem" if value > problem else "warning" if value > warning else "ok"


def example(line: str, longest: int = 60) -> str:
    """A line short enough to be quoted."""
    return repr(line if len(line) <= longest else line[: longest - 3] + "...")


UNKNOWN_RATES = (0.01, 0.1)  # above: a warning, a problem
PIECES_PER_WORD = (3.5, 8.0)
LONGEST_MEAN_WORD = 12  # characters: above, the language hardly has spaces and words mean nothing
BROKEN_LINES = (0.05, 0.5)
OTHER_STYLE = 0.5  # difference of shares

# What shows how a text was prepared.
STYLES = {
    "'@@ ', the joints of BPE": re.compile(r"@@( |$)"),
    "'▁', SentencePiece's mark of a word": re.compile("▁"),
    "'&apos;' and the like, escaped by Moses": re.compile(r"&(apos|quot|amp|#91|#93|#124);"),
    "' .', punctuation apart from its word": re.compile(r"\w [.,!?](\s|$)"),
    "capitals": re.compile("[A-ZÀ-ÖØ-ÞА-ЯΑ-Ω]"),
}


def check_unknown(ids: Sequence[Sequence[int]], unk_id: int, side: str) -> Finding:
    """How many pieces the vocabulary lacks; ids of one sentence a row, EOS last."""
    total = sum(len(sentence) - 1 for sentence in ids)
    rate = sum(list(sentence).count(unk_id) for sentence in ids) / max(total, 1)
    verdict = graded(rate, *UNKNOWN_RATES)
    advice = {
        "ok": "",
        "warning": ": the text has symbols that the vocabulary lacks",
        "problem": ": the text is in another language or script, or prepared otherwise, than the "
        "model's",
    }[verdict]
    return Finding(f"{side}: unknown", verdict, f"{rate:.2%} of the pieces are <unk>{advice}.")


def check_pieces(lines: Sequence[str], ids: Sequence[Sequence[int]], side: str) -> Finding:
    """How finely words are cut; a language that the tokenizer never saw falls into letters."""
    words = [word for line in lines for word in line.split()]
    pieces = sum(len(sentence) - 1 for sentence in ids) / max(len(words), 1)
    has_words = sum(map(len, words)) <= LONGEST_MEAN_WORD * len(words)
    verdict = graded(pieces, *PIECES_PER_WORD) if has_words else "ok"
    advice = (
        ""
        if verdict == "ok"
        else ", as where the tokenizer was made for another language: check the language and "
        "whether the text is tokenised already"
    )
    return Finding(f"{side}: pieces", verdict, f"{pieces:.2f} pieces a word{advice}.")


def check_round_trip(lines: Sequence[str], decoded: Sequence[str], side: str) -> Finding:
    """Whether encoding and decoding gives the text back."""
    broken = [(a, b) for a, b in zip(lines, decoded, strict=True) if a.strip() != b]
    share = len(broken) / len(lines)
    text = f"{1 - share:.1%} of the lines come back from encoding and decoding unchanged"
    if broken:
        before, after = broken[0]
        text += f"; {example(before)} became {example(after)}"
    return Finding(f"{side}: round trip", graded(share, *BROKEN_LINES), f"{text}.")


def check_style(hypotheses: Sequence[str], references: Sequence[str]) -> Finding:
    """Whether the translations are written as the references are: tokenised or not, in capitals."""
    for name, pattern in STYLES.items():
        said, expected = (
            sum(bool(pattern.search(line)) for line in lines) / len(lines)
            for lines in (hypotheses, references)
        )
        if abs(said - expected) > OTHER_STYLE:
            return Finding(
                "style",
                "problem",
                f"{expected:.0%} of the references but {said:.0%} of the translations have {name}: "
                f"the text is not prepared as the model's was; {example(references[0])} was "
                f"translated as {example(hypotheses[0])}.",
            )
    return Finding("style", "ok", "Translations and references are written alike.")


NO_TRANSLATION = 2.0  # BLEU
POOR_TRANSLATION = 10.0
CLEARLY = 0.2  # nats a token


def check_model(model: Transformer) -> Finding:
    """Architecture and size; weights that are no numbers."""
    broken = [name for name, each in model.named_parameters() if not each.isfinite().all()]
    if broken:
        return Finding(
            "model",
            "problem",
            f"{broken[0]} holds NaN or infinity: the file is damaged, or training diverged.",
        )
    config = model.config
    parameters = sum(each.numel() for each in model.parameters())
    return Finding(
        "model",
        "ok",
        f"{config['encoder_layers']} + {config['decoder_layers']} layers of "
        f"{config['model_dim']} ({config['decoder_cell']} decoder, {config['norm']}-norm), "
        f"{parameters:,} parameters.",
    )


def check_vocabulary(model: Transformer, tokenizer: Tokenizer) -> Finding:
    """Whether the tokenizer's ids are the model's."""
    vocabulary, size = tokenizer.vocabulary, model.output_projection.out_features
    ours = (vocabulary.size, vocabulary.pad_id, vocabulary.start_id, vocabulary.eos_id)
    theirs = (size, model.pad_id, model.start_id, model.eos_id)
    if ours != theirs:
        return Finding(
            "vocabulary",
            "problem",
            f"The tokenizer has size, padding, start and end {ours}, the model {theirs}: they do "
            "not belong together.",
        )
    return Finding("vocabulary", "ok", f"{size:,} ids, the same in model and tokenizer.")


def check_bleu(
    hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str], bleu: Bleu
) -> Finding:
    """BLEU of greedy translations; a fault of languages or preparation leaves next to nothing."""
    score = bleu.score(hypotheses, references).value
    text = f"BLEU {score:.1f} of {len(hypotheses)} greedy translations"
    if score >= POOR_TRANSLATION:
        return Finding("translation", "ok", f"{text}.")
    copied = bleu.score(hypotheses, sources).value
    cause = (
        "it copies the source, so the text may be in the model's target language already"
        if copied > 2 * max(score, NO_TRANSLATION)
        else "wrong languages, text that is tokenised otherwise, or weights that are not trained"
    )
    said = f"{example(sources[0])} became {example(hypotheses[0])}"
    verdict = graded(-score, -POOR_TRANSLATION, -NO_TRANSLATION)
    return Finding("translation", verdict, f"{text}: {cause}; {said}.")


def check_direction(forward: float, backward: float, source: str, target: str) -> Finding:
    """Whether the model finds the text likelier the other way round.

    Args:
        forward: Mean log p(gold) of targets given sources, in nats a token.
        backward: The same with both sides exchanged.
        source: The source's language.
        target: The target's.
    """
    text = f"mean log p(gold) is {forward:.2f} from {source} to {target}, {backward:.2f} backwards"
    if backward > forward + CLEARLY:
        return Finding("direction", "problem", f"{text}: exchange source and target.")
    return Finding("direction", "ok", f"{text}.")


KNN_WEIGHTS = (0.1, 0.3, 0.5, 0.7)
FEW_RIGHT, HARDLY_ANY_RIGHT = 0.25, 0.1  # of the nearest neighbours
INSIDE = 0.5  # share of tokens whose very state is stored
ROUNDING = 1e-3  # of the spread of distances: so near only rounding keeps equal states apart
BEYOND_GRID = 4.0  # times the largest or below the smallest temperature that tuning would try
LAYERS = {"opl_input": "output projection", "ffn_input": "last feed-forward network"}
SAME_KEY = 0.01  # relative difference that float16 and other arithmetic leave


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
    """Whether keys are what the layer that the datastore names sees in this model.

    Args:
        stored: Keys of some training tokens, [n, D].
        ours: The model's keys before the same tokens, [n, D].
        key_layer: The layer.
    """
    layer = LAYERS[key_layer]
    if stored.shape != ours.shape:
        return Finding(
            "key layer",
            "problem",
            f"Keys have {stored.shape[1]} numbers, but this model's {layer} sees {ours.shape[1]}: "
            "they come from another model or layer. Build the datastore again.",
        )
    difference = float((stored.float() - ours).norm() / ours.norm())
    text = f"keys differ by {difference:.2%} from the states that the {layer} sees"
    if difference > SAME_KEY:
        advice = "other weights, another layer or other text made them. Build the datastore again"
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
        advice = "the datastore's keys or values are not this model's, or its text is of another"
        return Finding("neighbours", "problem", f"{text}: {advice} kind.")
    if inside > INSIDE:
        advice = "are stored themselves, so this text is in the datastore and not held out"
        return Finding("neighbours", "warning", f"{text}; {inside:.0%} {advice}.")
    if right < FEW_RIGHT:
        return Finding("neighbours", "warning", f"{text}: the datastore's text is rather unlike.")
    return Finding("neighbours", "ok", f"{text}.")


def best_setting(record: Record) -> Setting:
    """The k, λ and T of a small grid that make the recorded text likeliest."""
    ks = [k for k in (1, 2, 4, 8) if k <= record.max_neighbours]
    grid = score_grid(record, ks, KNN_WEIGHTS, temperatures_for(record))
    k, temperature, weight = (int(i[0]) for i in (grid.scores == grid.scores.max()).nonzero())
    return grid.setting((k, temperature, weight))


def gold_probs(record: Record, setting: Setting) -> Tensor:
    """(1 - λ) p_NMT(gold) + λ p_kNN(gold) of every recorded token, [M]."""
    k = setting.num_neighbours
    neighbours = Neighbours(
        record.tokens[:, :k].long(), record.distances[:, :k], record.entries[:, :k]
    )
    probs, weight = FixedCombiner(k, setting.knn_weight, setting.temperature)(neighbours)
    knn_probs = (probs * (neighbours.tokens == record.gold[:, None])).sum(dim=-1)
    return torch.lerp(record.gold_log_probs.exp(), knn_probs, weight.squeeze(-1))


def check_gold(record: Record, setting: Setting) -> Finding:
    """What a setting makes of p(gold); judged by its logarithm, as tuning does."""
    alone, mixed = record.gold_log_probs.exp(), gold_probs(record, setting)
    text = (
        f"mean p(gold) is {alone.mean():.3f} without retrieval, {mixed.mean():.3f} with it; mean "
        f"log p(gold) {alone.log().mean():.2f} and {mixed.log().mean():.2f} ({setting})"
    )
    if mixed.log().mean() <= alone.log().mean():
        return Finding("p(gold)", "warning", f"{text}: retrieval from this text does not help.")
    return Finding("p(gold)", "ok", f"{text}.")


def check_temperature(record: Record, suggested: Setting, temperature: float | None) -> Finding:
    """Whether a temperature fits the distances at hand."""
    tried = temperatures_for(record)
    advice = f"{suggested.temperature:g} suits these distances ({min(tried):g} to {max(tried):g})"
    if temperature is None:
        return Finding("temperature", "ok", f"{advice}.")
    text = f"{temperature:g} was given; {advice}"
    if temperature < min(tried) / BEYOND_GRID:
        effect = "so low a temperature leaves the nearest neighbour alone"
        return Finding("temperature", "problem", f"{text}: {effect}.")
    if temperature > max(tried) * BEYOND_GRID:
        effect = "so high a temperature makes all neighbours equal, however far"
        return Finding("temperature", "problem", f"{text}: {effect}.")
    if min(tried) <= temperature <= max(tried):
        return Finding("temperature", "ok", f"{text}.")
    return Finding("temperature", "warning", f"{text}: tuning would not try it.")


PACKAGES = ("torch", "pytorch-lightning", "sentencepiece", "sacrebleu")
FAISS_PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12")  # one of them has the library
TIGHT = 0.5  # of the available memory


def check_size(
    directory: Path, num_entries: int, key_dim: int, seconds_per_entry: float
) -> Finding:
    """What the datastore of the whole training text takes.

    Args:
        directory: Where datastores are kept.
        num_entries: Target tokens of the training text.
        key_dim: D.
        seconds_per_entry: Measured on a part of the text.
    """
    try:
        estimate = refuse_if_too_large(directory, num_entries, key_dim)
    except DatastoreTooLargeError as error:
        return Finding("size", "problem", str(error))
    memory = available_memory()
    text = (
        f"the whole training text gives {num_entries:,} entries of {key_dim} numbers: "
        f"{_bytes(estimate.disk_bytes)} on the disk, at most {_bytes(estimate.memory_bytes)} of "
        f"the {_bytes(memory)} of memory available, about "
        f"{_duration(num_entries * seconds_per_entry)} to build"
    )
    if estimate.memory_bytes > TIGHT * memory:
        return Finding("size", "warning", f"{text}: close the other programs first.")
    return Finding("size", "ok", f"{text}.")


def describe_speed(num_tokens: int, seconds: float) -> Finding:
    """How fast the greedy translations came."""
    return Finding("speed", "ok", f"{num_tokens / seconds:,.0f} tokens a second, greedily.")


def describe_machine(device: torch.device) -> Finding:
    """Where it runs, and whether there is something faster."""
    text = f"device {device}, {torch.get_num_threads()} threads, {platform.platform(terse=True)}"
    if torch.cuda.is_available() and device.type == "cpu":
        name = torch.cuda.get_device_name()
        return Finding("device", "warning", f"{text}; a {name} stands idle: --device cuda uses it.")
    return Finding("device", "ok", f"{text}.")


def describe_versions() -> Finding:
    """Python and the libraries that results depend on."""
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{package} {version(package)}" for package in PACKAGES]
    faiss = next(filter(None, map(_version_if_there, FAISS_PACKAGES)), None)
    if faiss is None:
        listed = ", ".join(versions)
        return Finding("versions", "warning", f"{listed}; without faiss, search is exact alone.")
    return Finding("versions", "ok", ", ".join([*versions, faiss]) + ".")


def _version_if_there(package: str) -> str | None:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return None


def _bytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
