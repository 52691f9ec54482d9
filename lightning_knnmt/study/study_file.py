"""A study is one YAML file:

    description: What is compared on what.
    overrides: [model=bergamot, decoding=greedy]      # arguments of every run of train.py
    tests:                                            # every domain's systems are tested on these
      news: "{data}/news/test"
    domains:
      it: [data=text, "data.root={data}/it", data.source_lang=de, data.target_lang=en]
    methods:
      NMT: {overrides: [fit=false]}
      FT: {overrides: [module=full]}
      Adapter 64:
        overrides: [module=adapter, module.bottleneck_dim=64]
        choose: {module.optimizer.lr: [3e-4, 1e-3]}   # by the validation loss of short pilot runs
        pilot_batches: 50
      Adapter 128: {overrides: [...], choices_of: Adapter 64}
      AK-MT + Adapter 64: {model_of: Adapter 64, overrides: [fit=false, knn=adaptive]}
    baselines: [NMT, FT]                              # all others are compared with these
    choose_on: it                                     # this domain's pilots choose for all domains
    comparisons: [[AK-MT + Adapter 64, Adapter 64]]   # further pairs to compare
    general_text: "{data}/news/train"                 # of other domains, for word frequencies
    analyses: {base: NMT, adapted: AK-MT + Adapter 64}
    analysed_sentences: 1000                          # of each text, at most

Only domains and methods are required. Without baselines the first method is the only one. {data}
stands for the folder of --data, {model} for the path of --model.

`analyses` says which method plays which part; an analysis whose parts are missing is left out:

    base         the model alone                 retrieval    kNN-MT with one k, λ and T
    adaptive     kNN-MT with a trained combiner  projection   a fine-tuned output projection
    full         full fine-tuning                adapted      adapters with kNN-MT on top

base and retrieval are needed by most; adaptive by the comparison of combiners trained before and
after the adapters. Word recall needs general_text and compares with the last of the baselines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_knnmt.study.plan import Method, Study, StudyError

STUDY_KEYS = {
    *("description", "overrides", "tests", "domains", "methods", "baselines", "choose_on"),
    *("comparisons", "general_text", "analyses", "analysed_sentences"),
}
PARTS = {"base", "retrieval", "adaptive", "projection", "full", "adapted"}
METHOD_KEYS = {"overrides", "choose", "pilot_batches", "choices_of", "model_of"}


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
        raise StudyError(f"There is no study {path}: studies/ has some.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} is not YAML: {error}.") from error
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror}.") from error
    content = _mapping(path, "the study", content, STUDY_KEYS)
    domains = _mapping(path, "domains", content.get("domains"))
    entries = _mapping(path, "methods", content.get("methods"))
    if not domains or not entries:
        raise StudyError(f"{path} needs at least one domain and one method.")
    fill = _filler(path, {"data": data, "model": model})
    methods = {name: _method(path, name, entry, fill) for name, entry in entries.items()}
    _check_order(path, methods)
    baselines = _texts(path, "baselines", content.get("baselines"), "methods") or [*methods][:1]
    analyses = _mapping(path, "analyses", content.get("analyses"), PARTS)
    for key, names in (("baselines", baselines), ("analyses", analyses.values())):
        for name in names:
            if name not in methods:
                raise StudyError(
                    f"{path}: {key} names {name!r}, which is not a method of the study; methods "
                    f"are {', '.join(methods)}."
                )
    choose_on = content.get("choose_on")
    if choose_on is not None and choose_on not in domains:
        raise StudyError(f"{path}: choose_on names {choose_on!r}, which is no domain of the study.")
    comparisons = content.get("comparisons") or []
    for pair in comparisons:
        if not isinstance(pair, list) or len(pair) != 2 or not {*pair} <= methods.keys():
            raise StudyError(
                f"{path}: comparisons has {pair!r}, but each must be a pair of methods of the "
                "study, such as [AK-MT, kNN-MT]."
            )
    tests = _mapping(path, "tests", content.get("tests"))
    for name in tests:
        if not re.fullmatch(r"[\w-]+", name):
            raise StudyError(
                f"{path}: the test set {name!r} needs a name of letters, digits, - and _ only."
            )
    sentences = content.get("analysed_sentences", Study.analysed_sentences)
    return Study(
        name=path.stem,
        description=str(content.get("description", "")).strip(),
        overrides=fill(_texts(path, "overrides", content.get("overrides"))),
        tests={name: fill([str(test)])[0] for name, test in tests.items()},
        domains={name: fill(_texts(path, name, domain)) for name, domain in domains.items()},
        methods=methods,
        baselines=tuple(baselines),
        choose_on=choose_on,
        comparisons=tuple((first, second) for first, second in comparisons),
        general_text=fill([str(content.get("general_text") or "")])[0],
        analyses=analyses,
        analysed_sentences=_at_least_1(path, "analysed_sentences", sentences),
    )


def _method(
    path: Path, name: str, entry: Any, fill: Callable[[list[str]], tuple[str, ...]]
) -> Method:
    what = f"the method {name!r}"
    entry = _mapping(path, what, entry, METHOD_KEYS)
    overrides = fill(_texts(path, f"overrides of {name!r}", entry.get("overrides")))
    choose = _mapping(path, f"choose of {name!r}", entry.get("choose"))
    values = {key: tuple(_texts(path, key, each, "values")) for key, each in choose.items()}
    for key, each in values.items():
        if not each:
            raise StudyError(f"{path}: {what} has no value of {key} to choose: give at least one.")
    if values and "fit=false" in overrides:
        raise StudyError(f"{path}: {what} has fit=false, so it trains nothing to choose by.")
    batches = _at_least_1(path, f"pilot_batches of {name!r}", entry.get("pilot_batches", 50))
    return Method(name, overrides, values, batches, entry.get("choices_of"), entry.get("model_of"))


def _check_order(path: Path, methods: Mapping[str, Method]) -> None:
    for number, method in enumerate(methods.values()):
        earlier = list(methods)[:number]
        for kind, other in (("model_of", method.model_of), ("choices_of", method.choices_of)):
            if other is not None and other not in earlier:
                raise StudyError(
                    f"{path}: {kind} of {method.name!r} is {other!r}, but it must be a method "
                    f"above it: {', '.join(earlier) or 'there is none'}."
                )
        if method.model_of and "fit=false" in methods[method.model_of].overrides:
            raise StudyError(
                f"{path}: model_of of {method.name!r} is {method.model_of!r}, which has fit=false "
                "and so leaves no model: leave model_of out."
            )


def _filler(
    path: Path, values: Mapping[str, Path | None]
) -> Callable[[list[str]], tuple[str, ...]]:
    def fill(texts: list[str]) -> tuple[str, ...]:
        for name, value in values.items():
            if value is None and any(f"{{{name}}}" in text for text in texts):
                raise StudyError(f"{path} uses {{{name}}}: say what it is with --{name}.")
            texts = [text.replace(f"{{{name}}}", str(value)) for text in texts]
        return tuple(texts)

    return fill


def _mapping(path: Path, what: str, value: Any, known: set[str] | None = None) -> dict[str, Any]:
    """A mapping by text; empty if there is no value. Unknown keys are rejected."""
    if value is not None and not isinstance(value, dict):
        keys = f" with the keys {', '.join(sorted(known))}" if known else ""
        raise StudyError(f"{path}: {what} must be a mapping{keys}, not {value!r}.")
    mapping = {str(key): each for key, each in (value or {}).items()}
    unknown = sorted(set(mapping) - known) if known else []
    if unknown:
        raise StudyError(
            f"{path}: {what} has the unknown key {unknown[0]!r}; known are "
            f"{', '.join(sorted(known or ()))}."
        )
    return mapping


def _texts(path: Path, what: str, value: Any, kind: str = "overrides") -> list[str]:
    """A list of strings and numbers, as strings; empty if there is no value."""
    known = str | int | float
    if value is not None and not (
        isinstance(value, list) and all(isinstance(each, known) for each in value)
    ):
        raise StudyError(f"{path}: {what} must be a list of {kind}, not {value!r}: put it in [ ].")
    return [str(each) for each in value or []]


def _at_least_1(path: Path, what: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise StudyError(f"{path}: {what} is {value!r}, but it must be an integer of at least 1.")
    return value
