"""A study is one YAML file:

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
    choose_on: it                                     # whose pilots choose for all domains
    comparisons: [[AK-MT + Adapter 64, Adapter 64]]   # beside those to NMT and FT
    general_text: "{data}/news/train"                 # for word frequencies
    analyses: {base: NMT, adapted: AK-MT + Adapter 64}  # the parts: see PARTS
    analysed_sentences: 1000                          # of each test set

`{data}` stands for the folder that `--data` names, `{model}` for the path that `--model` names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_knnmt.study.plan import Method, Study, StudyError

STUDY_KEYS = {
    *("description", "overrides", "tests", "domains", "methods"),
    *("choose_on", "comparisons", "general_text", "analyses", "analysed_sentences"),
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
    choose_on = content.get("choose_on")
    if choose_on is not None and choose_on not in content["domains"]:
        raise StudyError(f"{path}: choose_on names {choose_on!r}, which is no domain of the study.")
    comparisons = content.get("comparisons", [])
    for pair in comparisons:
        if not isinstance(pair, list) or len(pair) != 2 or not {*pair} <= methods.keys():
            raise StudyError(
                f"{path}: comparisons has {pair!r}, but each must be two methods of the study, "
                "as [AK-MT, kNN-MT]."
            )
    sentences = content.get("analysed_sentences", Study.analysed_sentences)
    if not isinstance(sentences, int) or sentences < 1:
        raise StudyError(
            f"{path}: analysed_sentences is {sentences!r}, but it must be a whole number of at "
            "least 1."
        )
    return Study(
        name=path.stem,
        description=str(content.get("description", "")).strip(),
        overrides=fill(content.get("overrides", [])),
        tests={str(k): fill([v])[0] for k, v in content.get("tests", {}).items()},
        domains={str(k): fill(v) for k, v in content["domains"].items()},
        methods=methods,
        choose_on=choose_on,
        comparisons=tuple((first, second) for first, second in comparisons),
        general_text=fill([content.get("general_text", "")])[0],
        analyses=analyses,
        analysed_sentences=sentences,
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
