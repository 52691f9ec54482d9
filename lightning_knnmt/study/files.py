"""The texts that a study reads: whether they are there, before anything runs, and what they say."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from lightning_knnmt.study.plan import Study, StudyError


def own_test(study: Study, domain: str) -> str:
    """The path of a domain's test set, without its language ending."""
    test = study.setting(domain, "data.test") or "test"
    return str(Path(study.setting(domain, "data.root")) / test)


def train_text(study: Study, domain: str) -> str:
    """The path of a domain's training text, without its language ending."""
    return str(Path(study.setting(domain, "data.root")) / "train")


def read_lines(prefix: str, lang: str) -> list[str]:
    """The lines of one side of a text.

    Raises:
        StudyError: If there is no such file.
    """
    path = Path(f"{prefix}.{lang}")
    if not path.is_file():
        raise StudyError(f"There is no {path}, which the study asks for.")
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def digest(prefix: str, lang: str) -> str:
    """Of one side of a text; empty where it is missing."""
    path = Path(f"{prefix}.{lang}")
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_files(study: Study) -> None:
    """Looks for all texts of a study on plain text, so that no run is started in vain.

    Raises:
        StudyError: Naming the first that is missing.
    """
    for path in _wanted(study):
        if not path.is_file():
            raise StudyError(f"There is no {path}, which the study asks for: nothing was run.")


def _wanted(study: Study) -> Iterator[Path]:
    for domain in study.domains:
        langs = [study.setting(domain, f"data.{side}_lang") for side in ("source", "target")]
        root = study.setting(domain, "data.root")
        if study.setting(domain, "data") != "text" or not root or not all(langs):
            continue
        tests = [path for name, path in study.tests.items() if name != domain]
        own = [train_text(study, domain), str(Path(root) / "valid"), own_test(study, domain)]
        for prefix in [*own, *tests]:
            yield from (Path(f"{prefix}.{lang}") for lang in langs)
        if study.general_text:
            yield Path(f"{study.general_text}.{langs[1]}")
