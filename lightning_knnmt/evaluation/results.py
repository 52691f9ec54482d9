"""What an evaluation found, kept in a folder.

    results.json                     a list of rows: one method on one test set each
    hypotheses.TEST_SET.METHOD.txt   its translations, line by line

A later run adds to the folder: rows of the same method and test set are replaced where they stand,
others are kept, so `knn=none` and `knn=fixed` can be evaluated one after the other.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

RESULTS_NAME = "results.json"


class ResultsError(ValueError):
    """Results that cannot be written or read."""


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One method on one test set; a row of results.json, where None is left out.

    Attributes:
        seconds: Decoding alone, without loading and building.
        target_tokens: Tokens that were generated, the ends of sentences included.
        recall_at_k: Share of the exact k neighbours that the index finds.
        datastore_bytes: On disk, without indexes.
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
    k: int | None = None
    knn_weight: float | None = None
    temperature: float | None = None
    combiner_parameters: int | None = None  # if it was trained
    combiner_seconds: float | None = None  # of training it
    metric: str | None = None
    index: str | None = None
    recall_at_k: float | None = None
    datastore_entries: int | None = None
    datastore_bytes: int | None = None

    @property
    def sentences_per_second(self) -> float:
        return self.sentences / self.seconds

    @property
    def tokens_per_second(self) -> float:
        return self.target_tokens / self.seconds


def write_results(
    directory: Path, rows: Sequence[ResultRow], hypotheses: Mapping[str, Sequence[str]]
) -> None:
    """Adds rows and their translations to a folder; every file is whole at every moment.

    Args:
        directory: Where to.
        rows: All on one test set.
        hypotheses: The translations, by the rows' methods.
    """
    methods = {row.method for row in rows}
    if len(methods) != len(rows) or len({row.test_set for row in rows}) > 1:
        raise ResultsError(
            "The rows are not of different methods on one test set: write the rest apart."
        )
    if methods != hypotheses.keys():
        raise ResultsError(
            f"There are rows of {sorted(methods)} but translations of {sorted(hypotheses)}: every "
            "row needs its own."
        )
    texts = {hypotheses_path(directory, row): _as_text(row, hypotheses[row.method]) for row in rows}
    before = read_results(directory) if (directory / RESULTS_NAME).exists() else []
    merged = {(row.method, row.test_set): row for row in (*before, *rows)}
    facts = [{k: v for k, v in asdict(row).items() if v is not None} for row in merged.values()]
    as_json = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False)
    texts[directory / RESULTS_NAME] = as_json + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():  # results.json last: its rows promise the other files
        _replace(path, text)


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
            f"{path} is not a list of rows ({error}) with these keys: {allowed}. Delete it first."
        ) from error


def hypotheses_path(directory: Path, row: ResultRow) -> Path:
    """Returns the file of a row's translations."""
    test_set, method = (re.sub(r"[^\w.-]+", "-", name) for name in (row.test_set, row.method))
    return directory / f"hypotheses.{test_set}.{method}.txt"


def _as_text(row: ResultRow, lines: Sequence[str]) -> str:
    if len(lines) != row.sentences:
        raise ResultsError(
            f"{row.method} has {row.sentences:,} sentences but {len(lines):,} translations: give "
            "one for each."
        )
    for number, line in enumerate(lines, start=1):
        if "\n" in line or "\r" in line:
            raise ResultsError(
                f"Translation {number} of {row.method} has a line break: replace it by a space, as "
                "the file holds one translation a line."
            )
    return "".join(f"{line}\n" for line in lines)


def _replace(path: Path, text: str) -> None:
    """Writes a file beside its place and moves it there: readers see the old or the new one."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
