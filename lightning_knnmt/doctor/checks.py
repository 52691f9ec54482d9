"""The checks of machine, model, text and translation; each returns a finding."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple

import torch

from lightning_knnmt.data import Tokenizer
from lightning_knnmt.evaluation.scoring import Metric
from lightning_knnmt.models import Transformer

Verdict = Literal["ok", "warning", "problem"]


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        name: What was looked at, in a word or two.
        verdict: "problem" if translation or retrieval cannot be right, "warning" if they may not
            be.
        text: What was found and, unless it is ok, what to do.
    """

    name: str
    verdict: Verdict
    text: str


def graded(value: float, warning: float, problem: float) -> Verdict:
    """The verdict on a value of which more is worse."""
    return "problem" if value > problem else "warning" if value > warning else "ok"


QUOTED = 60  # characters
CONTEXT = 20  # of them before a difference


def example(line: str) -> str:
    """A line short enough to quote."""
    return repr(line if len(line) <= QUOTED else line[: QUOTED - 3] + "...")


def contrast(before: str, after: str) -> tuple[str, str]:
    """Two lines, cut to quotes around their first difference."""
    pairs = enumerate(zip(before, after, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))
    start = first - CONTEXT if first > CONTEXT + 3 else 0
    before, after = (("..." if start else "") + line[start:] for line in (before, after))
    return example(before), example(after)


# ------------------------------------------------------------------------ versions and machine

PACKAGES = ("torch", "pytorch-lightning", "sentencepiece", "sacrebleu")
FAISS_PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12")  # one of them has the library


def describe_versions() -> Finding:
    """Versions of Python and of the libraries that results depend on."""
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{package} {version(package)}" for package in PACKAGES]
    faiss = next(filter(None, map(_installed, FAISS_PACKAGES)), None)
    if faiss is None:
        listed = ", ".join(versions)
        advice = "without faiss there is only exact search (index=flat): install faiss-cpu"
        return Finding("versions", "warning", f"{listed}; {advice}.")
    return Finding("versions", "ok", ", ".join([*versions, faiss]) + ".")


def describe_machine(device: torch.device) -> Finding:
    """Where the model runs, and whether there is something faster."""
    text = f"device {device}, {torch.get_num_threads()} threads, {platform.platform(terse=True)}"
    if torch.cuda.is_available() and device.type == "cpu":
        name = torch.cuda.get_device_name()
        return Finding("device", "warning", f"{text}; a {name} is idle: use --device cuda.")
    return Finding("device", "ok", f"{text}.")


def describe_speed(num_tokens: int, seconds: float) -> Finding:
    """The speed of the greedy translations."""
    return Finding("speed", "ok", f"{num_tokens / seconds:,.0f} tokens per second, greedy.")


def _installed(package: str) -> str | None:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return None


# ------------------------------------------------------------------------ model and text

UNKNOWN_RATES = (0.01, 0.1)  # above: a warning, a problem
PIECES_PER_WORD = (3.5, 8.0)
MOST_SYMBOLS = 10  # named
LONGEST_MEAN_WORD = 12  # characters; longer where a language hardly uses spaces
BROKEN_LINES = (0.05, 0.5)
OTHER_STYLE = 0.5  # difference of shares

# What shows how a text was prepared.
STYLES = {
    "'@@ ', which joins BPE's pieces": re.compile(r"@@( |$)"),
    "'▁', SentencePiece's mark of a word": re.compile("▁"),
    "'&apos;' and the like, escaped by Moses": re.compile(r"&(apos|quot|amp|#91|#93|#124);"),
    "' .', punctuation separate from its word": re.compile(r"\w [.,!?](\s|$)"),
    "capitals": re.compile("[A-ZÀ-ÖØ-ÞА-ЯΑ-Ω]"),
}


def check_model(model: Transformer) -> Finding:
    """Architecture and size; weights that are not finite."""
    broken = [name for name, each in model.named_parameters() if not each.isfinite().all()]
    if broken:
        return Finding(
            "model",
            "problem",
            f"{broken[0]} has NaN or infinity: the file is damaged, or training diverged.",
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


def check_unknown(
    ids: Sequence[Sequence[int]], unk_id: int, symbols: Sequence[str], side: str
) -> Finding:
    """How many pieces the vocabulary lacks.

    Args:
        ids: Of each sentence, EOS last.
        unk_id: The id of unknown pieces.
        symbols: What is unknown in the text, with repetitions.
        side: The language.
    """
    total = sum(len(sentence) - 1 for sentence in ids)
    rate = sum(list(sentence).count(unk_id) for sentence in ids) / max(total, 1)
    verdict = graded(rate, *UNKNOWN_RATES)
    counts = Counter(symbols).most_common(MOST_SYMBOLS + 1)
    named = " ".join(symbol for symbol, _ in counts[:MOST_SYMBOLS])
    named += " ..." if len(counts) > MOST_SYMBOLS else ""
    advice = f": the vocabulary lacks {named}" if named else ""
    if verdict == "problem":
        advice += ". Check the text's language and script, and how it was prepared"
    return Finding(f"{side}: unknown", verdict, f"{rate:.2%} of the pieces are <unk>{advice}.")


def check_pieces(lines: Sequence[str], ids: Sequence[Sequence[int]], side: str) -> Finding:
    """How finely words are cut; a language the tokenizer never saw falls apart into letters."""
    words = [word for line in lines for word in line.split()]
    pieces = sum(len(sentence) - 1 for sentence in ids) / max(len(words), 1)
    has_words = sum(map(len, words)) <= LONGEST_MEAN_WORD * len(words)
    verdict = graded(pieces, *PIECES_PER_WORD) if has_words else "ok"
    advice = (
        ""
        if verdict == "ok"
        else ", as if the tokenizer were made for another language: check the language and whether "
        "the text is already tokenised"
    )
    return Finding(f"{side}: pieces", verdict, f"{pieces:.2f} pieces per word{advice}.")


def check_round_trip(
    lines: Sequence[str], decoded: Sequence[str], is_lossy: Sequence[bool], side: str
) -> Finding:
    """Whether encoding and decoding give the text back.

    Args:
        lines: The text.
        decoded: The same after encoding and decoding.
        is_lossy: Whether each line has unknown pieces.
        side: The language.
    """
    triples = zip(lines, decoded, is_lossy, strict=True)
    broken = [(a.strip(), b, lossy) for a, b, lossy in triples if a.strip() != b]
    share = len(broken) / len(lines)
    verdict = graded(share, *BROKEN_LINES)
    text = f"{1 - share:.1%} of the lines survive encoding and decoding unchanged"
    broken.sort(key=lambda each: not each[2])  # what is lost for good is the better example
    if broken:
        before, after = contrast(*broken[0][:2])
        text += f"; {before} became {after}"
    lost = sum(is_lossy)
    if lost:
        text += (
            f"; {lost} of {len(lines)} lines have unknown characters, which cannot be translated"
        )
        verdict = "warning" if verdict == "ok" else verdict
    return Finding(f"{side}: round trip", verdict, f"{text}.")


def check_style(hypotheses: Sequence[str], references: Sequence[str]) -> Finding:
    """Whether translations are written as the references are: tokenised or not, in capitals."""
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
                f"the text is not prepared as the model's was; the reference is "
                f"{example(references[0])}, the translation {example(hypotheses[0])}.",
            )
    return Finding("style", "ok", "Translations and references are written alike.")


# ------------------------------------------------------------------------ translation

NO_TRANSLATION = 2.0  # BLEU
POOR_TRANSLATION = 10.0
CLEARLY = 0.2  # nats per token


def check_bleu(
    hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str], bleu: Metric
) -> Finding:
    """BLEU of greedy translations; with wrong languages or preparation little of it is left."""
    score = bleu.score(hypotheses, references).value
    text = f"BLEU {score:.1f} of {len(hypotheses)} greedy translations"
    if score >= POOR_TRANSLATION:
        return Finding("translation", "ok", f"{text}.")
    copied = bleu.score(hypotheses, sources).value
    cause = (
        "it copies the source, so the text may already be in the model's target language: check "
        "--source and --target"
        if copied > 2 * max(score, NO_TRANSLATION)
        else "wrong or swapped languages, text that is tokenised in another way, or an untrained "
        "model"
    )
    said = f"{example(sources[0])} became {example(hypotheses[0])}"
    verdict = graded(-score, -POOR_TRANSLATION, -NO_TRANSLATION)
    return Finding("translation", verdict, f"{text}: {cause}; {said}.")


def check_direction(forward: float, backward: float, source: str, target: str) -> Finding:
    """Whether the text is more probable to the model with both sides swapped.

    Args:
        forward: Mean log p(gold) of targets given sources, in nats per token.
        backward: The same with source and target swapped.
        source: The source's language.
        target: The target's.
    """
    text = f"mean log p(gold) is {forward:.2f} from {source} to {target}, {backward:.2f} backwards"
    if backward > forward + CLEARLY:
        return Finding("direction", "problem", f"{text}: swap source and target.")
    return Finding("direction", "ok", f"{text}.")
