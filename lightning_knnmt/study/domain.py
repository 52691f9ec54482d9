"""All analyses of one domain, kept beside its runs: what is analysed is not analysed again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning_knnmt.study import analyses
from lightning_knnmt.study.outcomes import translations
from lightning_knnmt.study.plan import Run, Study, digest, own_test, read_lines, slug, train_text
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
from lightning_knnmt.study.system import System, load_system, record_text

VERSION = 5  # of what the analyses do
KEPT_NAME = "analyses.json"


@dataclass(frozen=True)
class Analysed:
    """What is known of a domain.

    Attributes:
        sections: Markdown.
        facts: The same numbers for programs, by analysis.
        figures: The folder of the figures.
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
    """Analyses a domain, or finds what was analysed before.

    Args:
        study: With `analyses`.
        runs: The domain's finished ones, by method.
        root: The study's folder.
        report: Takes lines for people.
    """
    parts = {part: name for part, name in study.analyses.items() if name in runs}
    names = [runs[name].directory.name for name in runs]
    language = study.setting(domain, "data.target_lang")
    general = digest(study.general_text, language)  # the domain's texts are in the runs' names
    facts = [VERSION, names, parts, study.analysed_sentences, general]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
    directory = root / slug(domain) / f"analyses-{name}"
    kept = directory / KEPT_NAME
    if kept.exists():
        return Analysed(
            **json.loads(kept.read_text(encoding="utf-8")), figures=directory / study.name
        )
    building = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(building, ignore_errors=True)
    load = partial(load_system, num_sentences=study.analysed_sentences)
    figures, prefix = building / study.name, f"{slug(domain)}-"
    sections = Sections(domain, figures, prefix, study.analysed_sentences)
    _words(sections, study, domain, runs)
    mechanism = {"base", "retrieval"} <= parts.keys()
    if mechanism or "adaptive" in parts:
        report(f"{domain}: loading the systems that are analysed")
        systems = {name: load(runs[name]) for name in parts.values()}
    if mechanism:
        _mechanism(sections, systems, parts, lambda said: report(f"{domain}: {said}"))
    # One after the other: each may have a datastore of its own.
    if "adaptive" in parts:
        report(f"{domain}: order of adapters and combiner")
        _order(sections, study, systems, runs, systems[parts["adaptive"]])
    if mechanism:
        report(f"{domain}: decoding speed")
        base = systems[parts["base"]]
        others = (systems.get(name) or load(runs[name]) for name in runs)
        speeds = analyses.analyse_speed(base, (each for each in others if each is not base))
        write_speed(sections, speeds, base.name)
    content = {"sections": sections.parts, "facts": sections.facts}
    (building / KEPT_NAME).write_text(json.dumps(content, ensure_ascii=False, indent=1))
    building.rename(directory)
    return Analysed(sections.parts, sections.facts, directory / study.name)


def _words(sections: Sections, study: Study, domain: str, runs: Mapping[str, Run]) -> None:
    language = study.setting(domain, "data.target_lang")
    if not study.general_text or "NMT" not in runs:
        return
    baseline = "FT" if "FT" in runs else "NMT"
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
    systems: Mapping[str, System],
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
    systems: Mapping[str, System],
    runs: Mapping[str, Run],
    adaptive: System,
) -> None:
    """Of every adapted model with the same kind of combiner as the base's."""
    assert adaptive.retrieval is not None, "only retrieval has a combiner"
    scores = {}
    for name in runs:
        if study.methods[name].model_of is None:
            continue
        adapted = systems.get(name) or load_system(runs[name], adaptive.num_sentences)
        if adapted.retrieval is not None and adapted.retrieval.fitted.path:
            scores[name] = analyses.analyse_order(adapted, adaptive)
    if scores:
        write_order(sections, scores)
