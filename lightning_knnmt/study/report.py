"""A study's report: Markdown tables in which every number has an interval, a command or both."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from lightning_knnmt import figures
from lightning_knnmt.bootstrap import Difference
from lightning_knnmt.study.collect import BASELINES, Cell, Cost
from lightning_knnmt.study.facts import list_facts
from lightning_knnmt.study.plan import Study, slug
from lightning_knnmt.study.runner import minutes


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
        "Training is processor time, of a combiner the clock's.",
    ]
    if failures:
        parts.append(
            "These runs are missing:\n\n" + "\n".join(f"- {failure}" for failure in failures)
        )
    for domain, found in by_domain.items():
        if found:
            parts += [f"## Adapted to {domain}", quality_table(found), *_without_lines(found)]
            parts.append(_scatter(domain, found, directory / study.name))
            parts.append(cost_table(domain, study, found, costs))
    signatures = {cell.row.bleu_signature for cell in cells}
    signatures |= {cell.row.chrf_signature for cell in cells}
    parts.append("\n".join(f"`{signature}`" for signature in sorted(signatures)))
    parts += sections
    parts += ["## Runs", runs_table(costs)]
    text = _hidden("\n\n".join(parts) + "\n", hide)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{study.name}.md"
    path.write_text(text, encoding="utf-8")
    facts = json.dumps(list_facts(cells, costs), indent=1, ensure_ascii=False) + "\n"
    path.with_suffix(".json").write_text(_hidden(facts, hide), encoding="utf-8")
    return path


def quality_table(cells: Sequence[Cell]) -> str:
    """BLEU and chrF of the systems of one domain, on its own test set and on the others."""
    tests = list(dict.fromkeys(cell.test_set for cell in cells))
    methods = list(dict.fromkeys(cell.method for cell in cells))
    found = {(cell.method, cell.test_set): cell for cell in cells}
    compared = [b for b in BASELINES if b in methods]
    header = ["method", "BLEU", *(f"against {b}" for b in compared), "chrF"]
    header += [f"BLEU on {test}" for test in tests[1:]]
    rows = []
    for method in methods:
        own = found[method, tests[0]]
        row = [method, f"{own.row.bleu:.2f}"]
        row += [interval(own.differences.get(("bleu", b))) for b in compared]
        row.append(_with_interval(own.row.chrf, own.differences.get(("chrf", "NMT"))))
        for test in tests[1:]:
            other = found[method, test]
            row.append(_with_interval(other.row.bleu, other.differences.get(("bleu", "NMT"))))
        rows.append(row)
    return markdown_table(header, rows)


def _without_lines(cells: Sequence[Cell]) -> list[str]:
    """BLEU without single lines, of the test sets where some difference hangs on one."""
    parts = []
    for test_set in dict.fromkeys(cell.test_set for cell in cells):
        found = [(cell.method, cell.without) for cell in cells if cell.test_set == test_set]
        known = [(method, without) for method, without in found if without is not None]
        if not known:
            continue
        compared = [b for b in BASELINES if any(b in each.differences for _, each in known)]
        parts.append(
            f"Line {known[0][1].line:,} of {test_set}'s test set decides: leaving it out moves "
            "differences of BLEU by more than half a point and a quarter of their intervals. "
            "Without it:"
        )
        header = ["method", f"BLEU on {test_set}", *(f"against {b}" for b in compared)]
        rows = [
            [method, f"{each.bleu:.2f}", *(interval(each.differences.get(b)) for b in compared)]
            for method, each in known
        ]
        parts.append(markdown_table(header, rows))
    return parts


def cost_table(domain: str, study: Study, cells: Sequence[Cell], costs: Sequence[Cost]) -> str:
    """Trained parameters, training time, memory and settings of the systems of one domain."""
    header = ["method", "trained parameters", "training", "peak memory, MiB"]
    header += ["retrieval", "chosen"]
    by_method = {cost.method: cost for cost in costs if cost.domain == domain}
    rows = []
    for cell in (cell for cell in cells if cell.is_in_domain):
        cost = by_method[cell.method]
        trainings = [cost.training]
        base = study.methods[cell.method].model_of
        if base is not None:
            trainings.append(by_method[base].training)
        known = [training for training in trainings if training is not None]
        parameters = sum(training["trained_parameters"] for training in known)
        parameters += cell.row.combiner_parameters or 0
        seconds = sum(training["cpu_seconds"] for training in known)
        seconds += cell.row.combiner_seconds or 0
        rows.append(
            [
                cell.method,
                f"{parameters:,}",
                minutes(seconds) if seconds else "",
                f"{cost.usage.peak_memory_bytes / 2**20:,.0f}" if cost.usage else "",
                _retrieval(cell),
                ", ".join(each.removeprefix("module.") for each in cost.chosen),
            ]
        )
    return markdown_table(header, rows)


def runs_table(costs: Sequence[Cost]) -> str:
    """Where each row's results.json is, and the command that made it."""
    rows = [
        [cost.domain, cost.method, f"`{cost.directory.name}`", f"`{cost.command}`"]
        for cost in costs
    ]
    return markdown_table(["domain", "method", "results.json in", "command"], rows)


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


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


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


def _retrieval(cell: Cell) -> str:
    row = cell.row
    parts = (
        ("k {}", row.k),
        ("λ {:g}", row.knn_weight),
        ("T {:g}", row.temperature),
        ("{:,} entries", row.datastore_entries),
    )
    return ", ".join(form.format(value) for form, value in parts if value is not None)


def interval(difference: Difference | None) -> str:
    """A difference for people: +1.2 [+0.8, +1.6]; empty if there is none."""
    if difference is None:
        return ""
    return f"{difference.value:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def _with_interval(value: float, difference: Difference | None) -> str:
    return f"{value:.2f} ({interval(difference)})" if difference else f"{value:.2f}"


def _hidden(text: str, names: Mapping[str, str] | None) -> str:
    for folder, name in (names or {}).items():
        text = text.replace(folder, name)
    return text
