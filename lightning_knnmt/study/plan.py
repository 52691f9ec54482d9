"""What a study runs: every method on every domain, and the texts that this needs."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


class StudyError(ValueError):
    """A study that cannot be planned or run."""


@dataclass(frozen=True)
class Method:
    """A row of the study's table.

    Attributes:
        overrides: Of `train.py`.
        choose: Values to try, by the override's key.
        pilot_batches: Training batches of each trial.
        choices_of: Another method whose chosen values are taken.
        model_of: Another method whose trained model is the base of this one.
    """

    name: str
    overrides: tuple[str, ...]
    choose: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    pilot_batches: int = 50
    choices_of: str | None = None
    model_of: str | None = None

    def trials(self) -> list[tuple[str, ...]]:
        """All combinations of the values to try, as overrides; none where nothing is chosen."""
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
        overrides: Of every run.
        tests: Paths of test sets without their language ending, by name.
        domains: Their overrides, by name.
        choose_on: The domain whose pilots choose values for all; None if each chooses its own.
        comparisons: Pairs of methods whose difference is of interest, beside those to NMT and FT.
        general_text: The path of text from elsewhere, for word frequencies; empty for none.
        analyses: Which method plays which part in them.
        analysed_sentences: How many of a text they ask about, at most, where that takes time.
    """

    name: str
    description: str
    overrides: tuple[str, ...]
    tests: Mapping[str, str]
    domains: Mapping[str, tuple[str, ...]]
    methods: Mapping[str, Method]
    choose_on: str | None = None
    comparisons: tuple[tuple[str, str], ...] = ()
    general_text: str = ""
    analyses: Mapping[str, str] = field(default_factory=dict)
    analysed_sentences: int = 1000

    def setting(self, domain: str, key: str) -> str:
        """The value of an override that all of a domain's runs share; empty if there is none."""
        overrides = (*self.overrides, *self.domains[domain])
        values = {name: value for name, _, value in (each.partition("=") for each in overrides)}
        return values.get(key, "")

    def select(self, domains: list[str] | None, methods: list[str] | None) -> Study:
        """The part of the study with these domains and methods, all if None.

        Raises:
            StudyError: If there is no such domain or method.
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
                        f"The method {method.name!r} needs {needed!r}: select both, or neither."
                    )
        return replace(self, domains=chosen_domains, methods=chosen_methods)


# A trial ends after some batches with one validation, and leaves its loss.
PILOT = (
    *("trainer.max_epochs=1", "trainer.val_check_interval=1.0", "test=false", "knn=none"),
    "++trainer.check_val_every_n_epoch=1",
)


@dataclass(frozen=True)
class Run:
    """One start of `train.py`. Its folder is named after all that it depends on.

    Attributes:
        label: For people: the domain, the method and, of a pilot, the values it tries.
        overrides: After `train.py`, in order.
        directory: Where its results are or will be.
        test_sets: Names of the test sets beside the domain's own; None for a pilot, which tests
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
    """A run whose folder changes with its command, so that no result is taken for another's.

    Args:
        overrides: Of `train.py`, but for what is tested.
        root: The study's folder.
        also_test: Paths of test sets beside the domain's own, by name; None for a pilot.
        values: What a pilot tries.
        inputs: A digest of the files that it reads; the folder changes with it too.
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


def chosen(kind: str, all_of_them: Mapping[str, Any], names: list[str] | None) -> dict[str, Any]:
    """Those that are named, all if None.

    Raises:
        StudyError: If there is none of that name.
    """
    for name in names or []:
        if name not in all_of_them:
            raise StudyError(f"The study has no {kind} {name!r}; it has {', '.join(all_of_them)}.")
    return {k: v for k, v in all_of_them.items() if names is None or k in names}


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
