"""What a study runs: every method on every domain, from one YAML file.

    description: What is compared on what.
    overrides: [model=bergamot, decoding=greedy]      # of every run, as typed after `train.py`
    tests:                                            # a domain is also tested on all the others
      news: "{data}/news/test"
    domains:
      it: [data=text, "data.root={data}/it", data.source_lang=de, data.target_lang=en]
    methods:
      NMT: {overrides: [fit=false]}
      Adapter 64:
        overrides: [module=adapter, module.bottleneck_dim=64]
        choose: {module.optimizer.lr: [3e-4, 1e-3]}   # by the validation loss of short pilot runs
        pilot_batches: 50
      Adapter 128: {overrides: [...], choices_of: Adapter 64}
      AK-MT + Adapter 64: {model_of: Adapter 64, overrides: [fit=false, knn=adaptive]}
    general_text: "{data}/news/train"                 # for word frequencies
    analyses: {base: NMT, adapted: AK-MT + Adapter 64}  # the parts: see PARTS

`{data}` stands for the folder that `--data` names, `{model}` for the path that `--model` names.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

STUDY_KEYS = {
    *("description", "overrides", "tests", "domains", "methods"),
    *("general_text", "analyses"),
}
PARTS = {"base", "retrieval", "adaptive", "projection", "full", "adapted"}
METHOD_KEYS = {"overrides", "choose", "pilot_batches", "choices_of", "model_of"}


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
        general_text: The path of text from elsewhere, for word frequencies; empty for none.
        analyses: Which method plays which part in them.
    """

    name: str
    description: str
    overrides: tuple[str, ...]
    tests: Mapping[str, str]
    domains: Mapping[str, tuple[str, ...]]
    methods: Mapping[str, Method]
    general_text: str = ""
    analyses: Mapping[str, str] = field(default_factory=dict)

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
        chosen_domains = _chosen("domain", self.domains, domains)
        chosen_methods = _chosen("method", self.methods, methods)
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
) -> Run:
    """A run whose folder changes with its command, so that no result is taken for another's.

    Args:
        overrides: Of `train.py`, but for what is tested.
        root: The study's folder.
        also_test: Paths of test sets beside the domain's own, by name; None for a pilot.
        values: What a pilot tries.
    """
    if also_test is None:
        overrides = (*overrides, *PILOT)
    else:
        tests = tuple(f"+data.also_test.{name}={path}" for name, path in also_test.items())
        overrides = (*overrides, *tests, "test_without_retrieval=false")
    digest = hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:8]
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


def read_study(path: Path, data: Path | None, model: Path | None = None) -> Study:
    """Reads and checks a study.

    Args:
        path: The YAML file.
        data: What `{data}` stands for.
        model: What `{model}` stands for.

    Raises:
        StudyError: Naming what is wrong with the file.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"There is no study {path}: conf/study/ holds some.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} is not YAML: {error}.") from error
    if not isinstance(content, dict):
        raise StudyError(f"{path} must be a mapping with the keys {', '.join(sorted(STUDY_KEYS))}.")
    _refuse_unknown(path, "the study", content, STUDY_KEYS)
    if not content.get("domains") or not content.get("methods"):
        raise StudyError(f"{path} needs at least one domain and one method.")
    fill = _filler(path, {"data": data, "model": model})
    methods = {
        str(name): _method(path, str(name), entry or {}, fill)
        for name, entry in content["methods"].items()
    }
    for method in methods.values():
        for kind, other in (("model_of", method.model_of), ("choices_of", method.choices_of)):
            earlier = list(methods)[: list(methods).index(method.name)]
            if other is not None and other not in earlier:
                raise StudyError(
                    f"{path}: {kind} of {method.name!r} is {other!r}, but it must be a method that "
                    f"stands above it: {', '.join(earlier) or 'none does'}."
                )
    analyses = {str(k): str(v) for k, v in content.get("analyses", {}).items()}
    _refuse_unknown(path, "analyses", analyses, PARTS)
    for name in analyses.values():
        if name not in methods:
            raise StudyError(f"{path}: analyses names {name!r}, which is no method of the study.")
    return Study(
        name=path.stem,
        description=str(content.get("description", "")).strip(),
        overrides=fill(content.get("overrides", [])),
        tests={str(k): fill([v])[0] for k, v in content.get("tests", {}).items()},
        domains={str(k): fill(v) for k, v in content["domains"].items()},
        methods=methods,
        general_text=fill([content.get("general_text", "")])[0],
        analyses=analyses,
    )


def _method(
    path: Path, name: str, entry: Any, fill: Callable[[list[Any]], tuple[str, ...]]
) -> Method:
    if not isinstance(entry, dict):
        raise StudyError(f"{path}: the method {name!r} must be a mapping, not {entry!r}.")
    _refuse_unknown(path, f"the method {name!r}", entry, METHOD_KEYS)
    choose = {key: tuple(values) for key, values in entry.get("choose", {}).items()}
    return Method(
        name=name,
        overrides=fill(entry.get("overrides", [])),
        choose=choose,
        pilot_batches=int(entry.get("pilot_batches", 50)),
        choices_of=entry.get("choices_of"),
        model_of=entry.get("model_of"),
    )


def _filler(
    path: Path, values: Mapping[str, Path | None]
) -> Callable[[list[Any]], tuple[str, ...]]:
    def fill(overrides: list[Any]) -> tuple[str, ...]:
        texts = [str(each) for each in overrides]
        for name, value in values.items():
            if value is None and any(f"{{{name}}}" in text for text in texts):
                raise StudyError(f"{path} speaks of {{{name}}}: say what that is with --{name}.")
            texts = [text.replace(f"{{{name}}}", str(value)) for text in texts]
        return tuple(texts)

    return fill


def _refuse_unknown(path: Path, what: str, mapping: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(mapping) - known)
    if unknown:
        raise StudyError(
            f"{path}: {what} has the unknown key {unknown[0]!r}; known are "
            f"{', '.join(sorted(known))}."
        )


def _chosen(kind: str, all_of_them: Mapping[str, Any], names: list[str] | None) -> dict[str, Any]:
    for name in names or []:
        if name not in all_of_them:
            raise StudyError(f"The study has no {kind} {name!r}; it has {', '.join(all_of_them)}.")
    return {k: v for k, v in all_of_them.items() if names is None or k in names}
