"""What a study runs: every method on every domain, and the texts this needs."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_knnmt.files import sha256_of


class StudyError(ValueError):
    """A study that cannot be planned or run."""


@dataclass(frozen=True)
class Method:
    """A row of the study's tables.

    Attributes:
        overrides: Arguments of `train.py`.
        choose: Values to try, by the override's key.
        pilot_batches: Training batches of each trial.
        choices_of: Another method whose chosen values this one takes.
        model_of: Another method whose trained model this one starts from.
    """

    name: str
    overrides: tuple[str, ...]
    choose: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    pilot_batches: int = 50
    choices_of: str | None = None
    model_of: str | None = None

    def trials(self) -> list[tuple[str, ...]]:
        """All combinations of the values to try, as overrides; empty if nothing is chosen."""
        if not self.choose:
            return []
        return [
            tuple(f"{key}={value}" for key, value in zip(self.choose, values, strict=True))
            for values in itertools.product(*self.choose.values())
        ]


@dataclass(frozen=True)
class Study:
    """A table of methods and domains.

    Attributes:
        overrides: Arguments of every run of `train.py`.
        tests: Paths of test sets without the language ending, by name.
        domains: Further arguments, by domain.
        baselines: Methods that all others are compared with.
        choose_on: The domain whose pilots choose values for all; None if each chooses its own.
        comparisons: Further pairs of methods to compare.
        general_text: Path of text from other domains, for word frequencies; empty for none.
        analyses: The method that plays each part, by part.
        analysed_sentences: How many sentences of a text the slow analyses use, at most.
    """

    name: str
    description: str
    overrides: tuple[str, ...]
    tests: Mapping[str, str]
    domains: Mapping[str, tuple[str, ...]]
    methods: Mapping[str, Method]
    baselines: tuple[str, ...]
    choose_on: str | None = None
    comparisons: tuple[tuple[str, str], ...] = ()
    general_text: str = ""
    analyses: Mapping[str, str] = field(default_factory=dict)
    analysed_sentences: int = 1000

    def setting(self, domain: str, key: str) -> str:
        """The value of an override that all runs of a domain share; empty if there is none."""
        overrides = (*self.overrides, *self.domains[domain])
        values = {name: value for name, _, value in (each.partition("=") for each in overrides)}
        return values.get(key, "")

    def select(self, domains: list[str] | None, methods: list[str] | None) -> Study:
        """The part of the study with these domains and methods; None selects all.

        Raises:
            StudyError: If there is no such domain or method, or a selected one needs another.
        """
        chosen_domains = chosen("domain", self.domains, domains)
        if self.choose_on and self.choose_on not in chosen_domains:
            raise StudyError(
                f"The study chooses values on the domain {self.choose_on!r}: select it too."
            )
        chosen_methods = chosen("method", self.methods, methods)
        for method in list(chosen_methods.values()):
            for needed in (method.model_of, method.choices_of):
                if needed and needed not in chosen_methods:
                    raise StudyError(
                        f"The method {method.name!r} needs {needed!r}: select both or neither."
                    )
        return replace(self, domains=chosen_domains, methods=chosen_methods)


# A pilot trains on some batches, validates once and leaves its loss.
PILOT = (
    *("trainer.max_epochs=1", "trainer.val_check_interval=1.0", "test=false", "knn=none"),
    "++trainer.check_val_every_n_epoch=1",
)


@dataclass(frozen=True)
class Run:
    """One start of `train.py`. Its folder's name follows from everything it depends on.

    Attributes:
        label: For people: the domain, the method and, for a pilot, the values it tries.
        overrides: Arguments of `train.py`, in order.
        directory: Where its results are or will be.
        test_sets: Names of the test sets besides the domain's own; None for a pilot, which tests
            nothing.
    """

    domain: str
    method: str
    label: str
    overrides: tuple[str, ...]
    directory: Path
    test_sets: tuple[str, ...] | None


def new_run(
    domain: str,
    method: str,
    overrides: tuple[str, ...],
    root: Path,
    also_test: Mapping[str, str] | None,
    values: tuple[str, ...] = (),
    inputs: str = "",
) -> Run:
    """Plans a run; another command or other inputs give another folder.

    Args:
        overrides: Arguments of `train.py`, apart from what is tested.
        root: The study's folder.
        also_test: Paths of test sets besides the domain's own, by name; None for a pilot.
        values: What a pilot tries.
        inputs: Digest of the files it reads.
    """
    if also_test is None:
        overrides = (*overrides, *PILOT)
    else:
        tests = tuple(f"+data.also_test.{name}={path}" for name, path in also_test.items())
        overrides = (*overrides, *tests, "test_base=false", "test_without_retrieval=false")
    digest = hashlib.sha256(json.dumps([overrides, inputs]).encode()).hexdigest()[:8]
    kind = "pilot-" if also_test is None else ""
    return Run(
        domain=domain,
        method=method,
        label=" · ".join([domain, method, *(values if also_test is None else ())]),
        overrides=overrides,
        directory=root / slug(domain) / f"{kind}{slug(method)}-{digest}",
        test_sets=None if also_test is None else tuple(also_test),
    )


def slug(name: str) -> str:
    """A name as a file name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-")


def chosen(kind: str, known: Mapping[str, Any], names: list[str] | None) -> dict[str, Any]:
    """The named entries in their order; all if `names` is None.

    Raises:
        StudyError: If there is no entry of that name.
    """
    for name in names or []:
        if name not in known:
            raise StudyError(f"The study has no {kind} {name!r}; it has {', '.join(known)}.")
    return {k: v for k, v in known.items() if names is None or k in names}


# The texts. A path is without its language ending.


def own_test(study: Study, domain: str) -> str:
    """The path of a domain's own test set."""
    test = study.setting(domain, "data.test") or "test"
    return str(Path(study.setting(domain, "data.root")) / test)


def train_text(study: Study, domain: str) -> str:
    """The path of a domain's training text."""
    return str(Path(study.setting(domain, "data.root")) / "train")


def read_lines(prefix: str, lang: str) -> list[str]:
    """The lines of one side of a text.

    Raises:
        StudyError: If there is no such file.
    """
    path = Path(f"{prefix}.{lang}")
    if not path.is_file():
        raise StudyError(f"There is no {path}, which the study needs.")
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def text_digest(prefix: str, lang: str) -> str:
    """The digest of one side of a text; empty if it is missing."""
    return _digest(Path(f"{prefix}.{lang}"))


def inputs_digest(study: Study, domain: str) -> str:
    """The digest of what a domain's runs read: plain texts, and the model if it is one file."""
    paths = [*_texts(study, domain), Path(study.setting(domain, "model.path"))]
    return hashlib.sha256("".join(_digest(path) for path in paths).encode()).hexdigest()


def require_files(study: Study) -> None:
    """Checks that all plain texts of a study exist, before anything runs.

    Raises:
        StudyError: Naming the first that is missing.
    """
    for domain in study.domains:
        texts = _texts(study, domain)
        if texts and study.general_text:
            texts.append(Path(f"{study.general_text}.{study.setting(domain, 'data.target_lang')}"))
        for path in texts:
            if not path.is_file():
                raise StudyError(f"There is no {path}, which the study needs. Nothing was run.")


def _digest(path: Path) -> str:
    return sha256_of(path) if path.is_file() else ""


def _texts(study: Study, domain: str) -> list[Path]:
    """What a domain's runs read, if it is plain text."""
    langs = [study.setting(domain, f"data.{side}_lang") for side in ("source", "target")]
    root = study.setting(domain, "data.root")
    if study.setting(domain, "data") != "text" or not root or not all(langs):
        return []
    tests = [path for name, path in study.tests.items() if name != domain]
    own = [train_text(study, domain), str(Path(root) / "valid"), own_test(study, domain)]
    return [Path(f"{prefix}.{lang}") for prefix in [*own, *tests] for lang in langs]
