"""The texts that a study reads: whether they are there, before anything runs, and what they say."""

from __future__ import annotations

import hashlib
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
    return _digest(Path(f"{prefix}.{lang}"))


def inputs_digest(study: Study, domain: str) -> str:
    """Of what a domain's runs read: the texts of a study on plain text, the model's file."""
    paths = [*_texts(study, domain), Path(study.setting(domain, "model.path"))]
    return hashlib.sha256("".join(_digest(path) for path in paths).encode()).hexdigest()


def require_files(study: Study) -> None:
    """Looks for all texts of a study on plain text, so that no run is started in vain.

    Raises:
        StudyError: Naming the first that is missing.
    """
    for domain in study.domains:
        texts = _texts(study, domain)
        if texts and study.general_text:
            texts.append(Path(f"{study.general_text}.{study.setting(domain, 'data.target_lang')}"))
        for path in texts:
            if not path.is_file():
                raise StudyError(f"There is no {path}, which the study asks for: nothing was run.")


def _digest(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _texts(study: Study, domain: str) -> list[Path]:
    """What a domain's runs read, if it is plain text."""
    langs = [study.setting(domain, f"data.{side}_lang") for side in ("source", "target")]
    root = study.setting(domain, "data.root")
    if study.setting(domain, "data") != "text" or not root or not all(langs):
        return []
    tests = [path for name, path in study.tests.items() if name != domain]
    own = [train_text(study, domain), str(Path(root) / "valid"), own_test(study, domain)]
    return [Path(f"{prefix}.{lang}") for prefix in [*own, *tests] for lang in langs]
