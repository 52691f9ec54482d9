"""A study's report: Markdown tables in which every number has an interval, a command or both."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_knnmt.study import figures
from lightning_knnmt.study.collect import Cell, Cost
from lightning_knnmt.study.facts import list_facts, write_facts
from lightning_knnmt.study.plan import Study, slug
from lightning_knnmt.study.tables import (
    comparison_table,
    cost_table,
    quality_tables,
    runs_table,
    without_lines,
)


def write_report(
    directory: Path,
    study: Study,
    cells: Sequence[Cell],
    costs: Sequence[Cost],
    *,
    command: str,
    machine: str,
    failures: Sequence[str] = (),
    hide: Mapping[str, str] | None = None,
    sections: Iterable[str] = (),
    analyses: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Writes `STUDY.md` and, for programs, `STUDY.json` with the same numbers.

    Args:
        directory: Where to.
        cells: Scores.
        costs: What they took.
        command: That made the report.
        machine: It was made on.
        failures: What failed runs said.
        hide: Names to print for folders.
        sections: More Markdown: the analyses.
        analyses: Their numbers, by domain and analysis.

    Returns:
        The Markdown file.
    """
    by_domain = {domain: [c for c in cells if c.domain == domain] for domain in study.domains}
    parts = [
        f"# {study.name}",
        study.description,
        f"```\n{command}\n```",
        f"{machine}. In brackets: 95 % intervals of the difference by paired bootstrap (1,000 "
        "resamples of the test sentences). Hyper-parameters were chosen on validation sets only. "
        "Training is processor time, of a combiner the clock's, without pilots and without "
        "building datastores. Peak memory is that of the run's process.",
    ]
    if failures:
        parts.append(
            "These runs are missing:\n\n" + "\n".join(f"- {failure}" for failure in failures)
        )
    analyses = analyses or {}
    for domain, found in by_domain.items():
        if found:
            speeds = analyses.get(domain, {}).get("speed", {})
            parts += [f"## Adapted to {domain}", *quality_tables(found)]
            parts += [*comparison_table(found, study), *without_lines(found)]
            parts.append(_scatter(domain, found, directory / study.name))
            parts.append(cost_table(domain, study, found, costs, speeds))
    signatures = {cell.row.bleu_signature for cell in cells}
    signatures |= {cell.row.chrf_signature for cell in cells}
    parts.append("\n".join(f"`{signature}`" for signature in sorted(signatures)))
    parts += sections
    parts += ["## Runs", runs_table(costs)]
    text = _hidden("\n\n".join(parts) + "\n", hide)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{study.name}.md"
    path.write_text(text, encoding="utf-8")
    facts = write_facts(list_facts(cells, costs), analyses)
    path.with_suffix(".json").write_text(_hidden(facts, hide), encoding="utf-8")
    return path


def machine() -> str:
    """The processor or GPU, and torch."""
    info = Path("/proc/cpuinfo")
    name = platform.processor() or platform.machine()
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def _scatter(domain: str, cells: Sequence[Cell], directory: Path) -> str:
    """A figure of all methods in and out of the domain, as Markdown."""
    scores = {
        (cell.method, cell.test_set): cell.without.bleu if cell.without else cell.row.bleu
        for cell in cells
    }
    inside = {method: bleu for (method, test_set), bleu in scores.items() if test_set == domain}
    outside = {
        method: [
            bleu for (m, test_set), bleu in scores.items() if m == method and test_set != domain
        ]
        for method in inside
    }
    if not all(outside.values()):
        return "There is no other test set."
    directory.mkdir(parents=True, exist_ok=True)
    figures.draw_domain_scores(
        {method: (bleu, statistics.mean(outside[method])) for method, bleu in inside.items()},
        directory / f"{slug(domain)}-domain-scores.png",
        f"Adapted to {domain}: BLEU in the domain, and the mean of the other test sets"
        + (", without decisive lines" if any(cell.without for cell in cells) else ""),
    )
    return f"![BLEU in and out of the domain]({directory.name}/{slug(domain)}-domain-scores.png)"


def _hidden(text: str, names: Mapping[str, str] | None) -> str:
    for folder, name in (names or {}).items():
        text = text.replace(folder, name)
    return text
