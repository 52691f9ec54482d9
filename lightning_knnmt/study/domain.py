"""All analyses of one domain. The result is kept beside its runs and read again next time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning_knnmt.files import locked, new_directory
from lightning_knnmt.study import analyses
from lightning_knnmt.study.analysed_system import AnalysedSystem, load_analysed, record_text
from lightning_knnmt.study.outcomes import translations
from lightning_knnmt.study.plan import (
    Run,
    Study,
    own_test,
    read_lines,
    slug,
    text_digest,
    train_text,
)
from lightning_knnmt.study.runner import Report, say
from lightning_knnmt.study.sections import (
    Sections,
    write_gradients,
    write_neighbours,
    write_order,
    write_predictions,
    write_scaling,
    write_speed,
    write_words,
)

VERSION = 6  # raise it when an analysis changes, so that kept results are not used
KEPT_NAME = "analyses.json"


@dataclass(frozen=True)
class Analysed:
    """The analyses of a domain.

    Attributes:
        sections: Markdown.
        facts: The same values for programs, by analysis.
        figures: Folder of the figures.
    """

    sections: list[str]
    facts: dict[str, Any]
    figures: Path


def analyse_domain(
    study: Study,
    domain: str,
    runs: Mapping[str, Run],
    root: Path,
    report: Report = say,
) -> Analysed:
    """Analyses a domain, or reads the kept result.

    Args:
        study: With `analyses`.
        domain: Its name.
        runs: The domain's finished runs, by method.
        root: The study's folder.
        report: Takes progress messages.
    """
    parts = {part: name for part, name in study.analyses.items() if name in runs}
    names = [runs[name].directory.name for name in runs]
    language = study.setting(domain, "data.target_lang")
    general = text_digest(study.general_text, language)  # own texts are in the runs' names
    facts = [VERSION, names, parts, study.baselines, study.analysed_sentences, general]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
    directory = root / slug(domain) / f"analyses-{name}"
    kept = directory / KEPT_NAME
    if not kept.exists():
        with locked(directory), new_directory(directory) as building:
            figures, prefix = building / study.name, f"{slug(domain)}-"
            sections = Sections(domain, figures, prefix, study.analysed_sentences)
            _analyse(sections, study, domain, runs, parts, lambda said: report(f"{domain}: {said}"))
            content = {"sections": sections.parts, "facts": sections.facts}
            text = json.dumps(content, ensure_ascii=False, indent=1)
            (building / KEPT_NAME).write_text(text, encoding="utf-8")
    content = json.loads(kept.read_text(encoding="utf-8"))
    return Analysed(content["sections"], content["facts"], directory / study.name)


def _analyse(
    sections: Sections,
    study: Study,
    domain: str,
    runs: Mapping[str, Run],
    parts: Mapping[str, str],
    report: Report,
) -> None:
    """Writes all analyses whose parts there are."""
    load = partial(load_analysed, num_sentences=study.analysed_sentences)
    _words(sections, study, domain, runs)
    mechanism = {"base", "retrieval"} <= parts.keys()
    if mechanism or "adaptive" in parts:
        report("loading the systems")
        systems = {name: load(runs[name]) for name in parts.values()}
    if mechanism:
        _mechanism(sections, systems, parts, report)
    # One after the other: each may have a datastore of its own.
    if "adaptive" in parts:
        report("order of adapters and combiner")
        _order(sections, study, systems, runs, systems[parts["adaptive"]])
    if mechanism:
        report("decoding speed")
        base = systems[parts["base"]]
        others = (systems.get(name) or load(runs[name]) for name in runs)
        speeds = analyses.analyse_speed(base, (each for each in others if each is not base))
        write_speed(sections, speeds, base.name)


def _words(sections: Sections, study: Study, domain: str, runs: Mapping[str, Run]) -> None:
    language = study.setting(domain, "data.target_lang")
    baselines = [name for name in study.baselines if name in runs]
    if not study.general_text or not baselines:
        return
    baseline = baselines[-1]
    recalls, differences = analyses.analyse_words(
        {name: translations(run, domain) for name, run in runs.items()},
        read_lines(own_test(study, domain), language),
        read_lines(train_text(study, domain), language),
        read_lines(study.general_text, language),
        baseline,
    )
    drawn = set(study.analyses.values()) & runs.keys() or runs.keys()
    write_words(sections, recalls, differences, baseline, drawn)


def _mechanism(
    sections: Sections,
    systems: Mapping[str, AnalysedSystem],
    parts: Mapping[str, str],
    report: Report,
) -> None:
    base, retrieval = parts["base"], parts["retrieval"]
    system = systems[retrieval]
    report("recording the test text")
    record = record_text(system, "test", analyses.NUM_NEIGHBOURS)
    report("gradients")
    write_gradients(sections, analyses.analyse_gradients(system, record))
    report("predictions")
    chosen = {name: systems[name] for name in dict.fromkeys(parts.values())}
    predictions = analyses.analyse_predictions(chosen, base, retrieval)
    write_predictions(sections, predictions)
    report("neighbours")
    found = {"base": analyses.analyse_neighbours(system, record)}
    if "adapted" in parts:
        adapted = systems[parts["adapted"]]
        other = record_text(adapted, "test", analyses.NUM_NEIGHBOURS)
        found["adapted"] = analyses.analyse_neighbours(adapted, other)
    write_neighbours(sections, found)
    report("parts of the datastore")
    write_scaling(sections, analyses.analyse_scaling(system))


def _order(
    sections: Sections,
    study: Study,
    systems: Mapping[str, AnalysedSystem],
    runs: Mapping[str, Run],
    adaptive: AnalysedSystem,
) -> None:
    """Compares the combiner of each adapted model with the base model's."""
    scores = {}
    for name in runs:
        if study.methods[name].model_of is None:
            continue
        adapted = systems.get(name) or load_analysed(runs[name], adaptive.num_sentences)
        retrieval = adapted.translator.retrieval
        if retrieval is not None and retrieval.fitted.path:
            scores[name] = analyses.analyse_order(adapted, adaptive)
    if scores:
        write_order(sections, scores)
