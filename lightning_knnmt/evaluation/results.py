"""What an evaluation leaves in a folder.

    results.json                     a list of rows: one method on one test set each
    hypotheses.TEST_SET.METHOD.txt   its translations, line by line

A folder holds rows that can be compared: a later run replaces the rows of its own methods and test
sets, and keeps others only if they are of the same weights, text and search. So `knn=none` and
`knn=fixed` can be evaluated one after the other, while rows of a training that has gone on since
disappear, and their translations with them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lightning_knnmt.files import write_atomically

log = logging.getLogger(__name__)

RESULTS_NAME = "results.json"


class ResultsError(ValueError):
    """Results that cannot be written or read."""


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One method on one test set; a row of results.json, where None is left out.

    Attributes:
        sentences: Lines of the test set.
        target_tokens: Generated tokens, the ends of sentences included.
        seconds: Decoding alone, without loading and building.
        text_digest: SHA-256 of the test set's sources and references.
        model_digest: SHA-256 of the model's settings and weights.
        decoding: The search's settings and the precision.
        bleu_tokenizer: sacreBLEU's, with which `bleu` was counted.
        knn_weight: λ, if it is the same for every token.
        peak: λ where the nearest neighbour's distance is zero, if λ falls with the distance.
        reach: The distance from which that λ is zero.
        combiner_parameters: Of a trained combiner.
        combiner_seconds: What training it took.
        recall_at_k: Share of the exact k neighbours that the index finds.
        datastore_bytes: On disk, without indexes.
        datastore_digest: SHA-256 of the digests of its keys and values.
    """

    method: str
    test_set: str
    bleu: float
    bleu_signature: str
    chrf: float
    chrf_signature: str
    sentences: int
    target_tokens: int
    seconds: float
    text_digest: str | None = None
    model_digest: str | None = None
    decoding: str | None = None
    bleu_tokenizer: str = "13a"
    k: int | None = None
    knn_weight: float | None = None
    temperature: float | None = None
    peak: float | None = None
    reach: float | None = None
    combiner_parameters: int | None = None
    combiner_seconds: float | None = None
    metric: str | None = None
    index: str | None = None
    recall_at_k: float | None = None
    datastore_entries: int | None = None
    datastore_bytes: int | None = None
    datastore_digest: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What a folder has one row for."""
        return self.method, self.test_set

    @property
    def sentences_per_second(self) -> float:
        return self.sentences / self.seconds

    @property
    def tokens_per_second(self) -> float:
        return self.target_tokens / self.seconds


def text_digest(sources: Sequence[str], references: Sequence[str]) -> str:
    """SHA-256 of a test set's lines, in hex."""
    lines = (line for side in (sources, references) for line in (f"{len(side)}", *side))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_translations(
    directory: Path, method: str, test_set: str, translations: Sequence[str]
) -> Path:
    """Writes translations before they are scored; an older row of theirs is removed first.

    Returns:
        Their file.
    """
    for number, line in enumerate(translations, start=1):
        if "\n" in line or "\r" in line:
            raise ResultsError(
                f"Translation {number} of {method} has a line break, but the file holds one "
                "translation a line: replace it by a space."
            )
    path = hypotheses_path(directory, method, test_set)
    before = _rows_so_far(directory)
    kept = [row for row in before if hypotheses_path(directory, *row.key) != path]
    if len(kept) < len(before):
        _write_rows(directory, kept)
    write_atomically(path, "".join(f"{line}\n" for line in translations))
    return path


def write_results(directory: Path, rows: Sequence[ResultRow]) -> None:
    """Adds rows whose translations `write_translations` wrote.

    Older rows of other weights, of another text by the same name, or decoded otherwise are removed
    together with their translations, because one table would compare them with the new ones.

    Args:
        directory: The folder.
        rows: Of one evaluation, all different in method or test set.
    """
    paths = {hypotheses_path(directory, *row.key): row for row in rows}
    if len(paths) < len(rows):
        names = [f"{row.method} on {row.test_set}" for row in rows]
        raise ResultsError(
            f"Two of the rows {', '.join(names)} share one file of translations: give test sets "
            "and methods names that differ in letters or digits."
        )
    for path, row in paths.items():
        found = path.read_text(encoding="utf-8").count("\n") if path.exists() else 0
        if found != row.sentences:
            raise ResultsError(
                f"{path} has {found:,} translations, but the row of {row.method} has "
                f"{row.sentences:,} sentences: every row needs its own translations."
            )
    new = {row.key for row in rows}
    others = [old for old in _rows_so_far(directory) if old.key not in new]
    kept = [old for old in others if _comparable(old, rows)]
    dropped = [old for old in others if old not in kept]
    merged = [*kept, *rows]
    test_sets = list(dict.fromkeys(row.test_set for row in merged))
    merged.sort(key=lambda row: (test_sets.index(row.test_set), row.k is not None))
    _write_rows(directory, merged)
    for old in dropped:
        path = hypotheses_path(directory, *old.key)
        if path not in paths:
            path.unlink(missing_ok=True)
    if dropped:
        log.warning(
            "%s had results of other weights, another text or other settings, now removed: %s.",
            directory / RESULTS_NAME,
            ", ".join(f"{old.method} on {old.test_set}" for old in dropped),
        )


def read_results(directory: Path) -> list[ResultRow]:
    """Reads the rows of a folder's results.json."""
    path = directory / RESULTS_NAME
    if not path.exists():
        raise ResultsError(f"{path} does not exist: evaluate.py and train.py write it.")
    try:
        return [ResultRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        allowed = ", ".join(field.name for field in fields(ResultRow))
        raise ResultsError(
            f"{path} is damaged ({error}): it must be a list of rows with the keys {allowed}. "
            "Delete it, or choose another folder with name=..."
        ) from error


def check_results(directory: Path) -> None:
    """Raises if there are results that new ones could not be added to."""
    _rows_so_far(directory)


def hypotheses_path(directory: Path, method: str, test_set: str) -> Path:
    """The file of a row's translations."""
    test_set, method = (re.sub(r"[^\w.-]+", "-", name) for name in (test_set, method))
    return directory / f"hypotheses.{test_set}.{method}.txt"


def _comparable(old: ResultRow, rows: Sequence[ResultRow]) -> bool:
    return (
        old.model_digest in {row.model_digest for row in rows}
        and old.decoding in {row.decoding for row in rows}
        and old.bleu_signature in {row.bleu_signature for row in rows}
        and all(old.text_digest == row.text_digest for row in rows if row.test_set == old.test_set)
    )


def _rows_so_far(directory: Path) -> list[ResultRow]:
    return read_results(directory) if (directory / RESULTS_NAME).exists() else []


def _write_rows(directory: Path, rows: Sequence[ResultRow]) -> None:
    facts = [{k: v for k, v in asdict(row).items() if v is not None} for row in rows]
    as_json = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(directory / RESULTS_NAME, as_json + "\n")
