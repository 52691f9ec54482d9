"""Whether the tokenizer was made for this text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_knnmt.doctor.finding import Finding, example, graded

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
