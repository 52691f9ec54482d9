"""A study's report: Markdown tables in which every value has an interval, a command or both."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lightning_knnmt.evaluation.bootstrap import Difference
from lightning_knnmt.files import write_atomically
from lightning_knnmt.study.figures import charts
from lightning_knnmt.study.outcomes import Cell, Cost
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
    analyses: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Writes `STUDY.md` and, for programs, `STUDY.json` with the same values.

    Args:
        directory: Where to.
        study: What was run.
        cells: Scores.
        costs: What the runs took.
        command: The one that makes the report.
        machine: The machine it ran on.
        failures: Messages of failed runs.
        hide: Names to print instead of folders.
        sections: More Markdown: the analyses.
        analyses: Their values, by domain and analysis.

    Returns:
        The Markdown file.
    """
    by_domain = {domain: [c for c in cells if c.domain == domain] for domain in study.domains}
    compared = sum(len(cell.differences) for cell in cells)
    parts = [
        f"# {study.name}",
        study.description,
        f"```\n{command}\n```",
        f"{machine}. In brackets: 95 % intervals of the difference by paired bootstrap (1,000 "
        "resamples of the test sentences). They show what other sentences would change, not what "
        f"another seed would, and are not corrected for the number of comparisons ({compared:,}): "
        "of systems that do not differ, 1 in 20 looks different. Hyper-parameters were chosen on "
        "validation sets only. Training is in processor time, of a combiner in elapsed time, "
        "without pilots and without building datastores. Peak memory is that of the run's process.",
    ]
    if failures:
        parts.append("Failed:\n\n" + "\n".join(f"- {failure}" for failure in failures))
    analyses = analyses or {}
    for domain, found in by_domain.items():
        if found:
            speeds = analyses.get(domain, {}).get("speed", {})
            parts += [f"## Adapted to {domain}", *quality_tables(found, study)]
            parts += [*comparison_table(found, study), *without_lines(found, study)]
            parts.append(_scatter(domain, found, directory / study.name))
            parts.append(cost_table(domain, study, found, costs, speeds))
    signatures = {cell.row.bleu_signature for cell in cells}
    signatures |= {cell.row.chrf_signature for cell in cells}
    parts.append("\n".join(f"`{signature}`" for signature in sorted(signatures)))
    parts += sections
    parts += ["## Runs", runs_table(costs)]
    path = directory / f"{study.name}.md"
    write_atomically(path, _hidden("\n\n".join(parts) + "\n", hide))
    facts = write_facts(list_facts(cells, costs), analyses)
    write_atomically(path.with_suffix(".json"), _hidden(facts, hide))
    return path


def machine() -> str:
    """The processor or GPU, and torch's version."""
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
    charts.draw_domain_scores(
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


# Tables. Cells are those of one domain.


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def interval(difference: Difference | None) -> str:
    """A difference with its interval, such as +1.2 [+0.8, +1.6]; empty if there is none."""
    if difference is None:
        return ""
    return f"{difference.value:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def quality_tables(cells: Sequence[Cell], study: Study) -> Iterator[str]:
    """BLEU and chrF on the domain's own test set, then on the others."""
    methods = list(dict.fromkeys(cell.method for cell in cells))
    own, *others = dict.fromkeys(cell.test_set for cell in cells)
    found = {(cell.method, cell.test_set): cell for cell in cells}
    compared = [b for b in study.baselines if b in methods]
    against = [f"against {b}" for b in compared]
    rows = []
    for method in methods:
        cell = found[method, own]
        bleu, chrf = (
            [interval(cell.differences.get((metric, b))) for b in compared]
            for metric in ("bleu", "chrf")
        )
        rows.append([method, f"{cell.row.bleu:.2f}", *bleu, f"{cell.row.chrf:.2f}", *chrf])
    yield markdown_table(["method", "BLEU", *against, "chrF", *against], rows)
    missing = [b for b in study.baselines if b not in methods]
    if missing:
        yield f"No differences to {' and '.join(missing)}: not among the finished methods."
    if not others:
        return
    baseline = compared[0] if compared else None
    yield "On other text" + (f", in brackets the difference to {baseline}:" if baseline else ":")
    header = [f"{metric} on {test_set}" for metric in ("BLEU", "chrF") for test_set in others]
    rows = []
    for method in methods:
        row = [method]
        for metric in ("bleu", "chrf"):
            for test_set in others:
                cell = found[method, test_set]
                score = cell.row.bleu if metric == "bleu" else cell.row.chrf
                gain = interval(cell.differences.get((metric, baseline or "")))
                row.append(f"{score:.2f} ({gain})" if gain else f"{score:.2f}")
        rows.append(row)
    yield markdown_table(["method", *header], rows)


def comparison_table(cells: Sequence[Cell], study: Study) -> Iterator[str]:
    """Paired differences of BLEU on all test sets: the study's pairs, and the other baselines.

    The first baseline's differences on other text are in `quality_tables` already.
    """
    methods = list(dict.fromkeys(cell.method for cell in cells))
    tests = list(dict.fromkeys(cell.test_set for cell in cells))
    found = {(cell.method, cell.test_set): cell for cell in cells}
    pairs = [*study.comparisons, *((m, b) for b in study.baselines[1:] for m in methods if m != b)]
    rows = [
        [
            f"{method} against {baseline}",
            *(interval(found[method, t].differences.get(("bleu", baseline))) for t in tests),
        ]
        for method, baseline in dict.fromkeys(pairs)
        if method in methods and baseline in methods
    ]
    if rows:
        yield "Systems against each other, BLEU:"
        yield markdown_table(["pair", *(f"on {test_set}" for test_set in tests)], rows)


def without_lines(cells: Sequence[Cell], study: Study) -> Iterator[str]:
    """BLEU without single lines, of the test sets where a difference hangs on one."""
    for test_set in dict.fromkeys(cell.test_set for cell in cells):
        found = [(cell.method, cell.without) for cell in cells if cell.test_set == test_set]
        known = [(method, without) for method, without in found if without is not None]
        if not known:
            continue
        compared = [b for b in study.baselines if any(b in each.differences for _, each in known)]
        yield (
            f"Line {known[0][1].line:,} of {test_set}'s test set is decisive: leaving it out moves "
            "a difference of BLEU by more than half a point and a quarter of its interval. Without "
            "it:"
        )
        header = ["method", f"BLEU on {test_set}", *(f"against {b}" for b in compared)]
        rows = [
            [method, f"{each.bleu:.2f}", *(interval(each.differences.get(b)) for b in compared)]
            for method, each in known
        ]
        yield markdown_table(header, rows)


def cost_table(
    domain: str,
    study: Study,
    cells: Sequence[Cell],
    costs: Sequence[Cost],
    speeds: Mapping[str, float],
) -> str:
    """What the systems cost, and their settings.

    Args:
        speeds: Of decoding, relative to the analyses' base, by method; may be empty.
    """
    header = ["method", "trained parameters", "training"]
    header += [f"decoding speed / {study.analyses['base']}"] if speeds else []
    header += ["peak memory, MiB", "retrieval", "chosen"]
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
        row = [cell.method, f"{parameters:,}", minutes(seconds) if seconds else ""]
        if speeds:
            row.append(f"{speeds[cell.method]:.2f}" if cell.method in speeds else "")
        row.append(f"{cost.usage.peak_memory_bytes / 2**20:,.0f}" if cost.usage else "")
        row += [_retrieval(cell), ", ".join(each.removeprefix("module.") for each in cost.chosen)]
        rows.append(row)
    return markdown_table(header, rows)


def runs_table(costs: Sequence[Cost]) -> str:
    """The folder of each run's results.json, and the command that made it."""
    rows = [
        [cost.domain, cost.method, f"`{cost.directory.name}`", f"`{cost.command}`"]
        for cost in costs
    ]
    return markdown_table(["domain", "method", "results.json in", "command"], rows)


def _retrieval(cell: Cell) -> str:
    row = cell.row
    parts = (
        ("k {}", row.k),
        ("λ {:g}", row.knn_weight),
        ("T {:g}", row.temperature),
        ("peak {:g}", row.peak),
        ("reach {:g}", row.reach),
        ("{:,} entries", row.datastore_entries),
    )
    return ", ".join(form.format(value) for form, value in parts if value is not None)


# The same values for programs.


def list_facts(cells: Sequence[Cell], costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """Everything known of every system on every test set, for JSON."""
    runs = {(cost.domain, cost.method): cost for cost in costs}
    facts = []
    for cell in cells:
        cost = runs[cell.domain, cell.method]
        differences = {
            f"{metric} against {baseline}": [each.value, each.low, each.high]
            for (metric, baseline), each in cell.differences.items()
        }
        row = {key: value for key, value in asdict(cell.row).items() if value is not None}
        facts.append(
            {
                "domain": cell.domain,
                "system": cell.method,
                "on": cell.test_set,
                **row,
                **differences,
                "without": _without(cell),
                "training": cost.training,
                "usage": _usage(cost),
                "run": cost.directory.name,
                "command": cost.command,
            }
        )
    return facts


def write_facts(
    systems: Sequence[Mapping[str, Any]], analyses: Mapping[str, Mapping[str, Any]]
) -> str:
    """The report as JSON: `systems` and, by domain, `analyses`; one line per entry."""

    def line(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    rows = ",\n".join(line(system) for system in systems)
    domains = ",\n".join(
        f"{line(domain)}: {{\n"
        + ",\n".join(f"{line(name)}: {line(found)}" for name, found in analysed.items())
        + "\n}"
        for domain, analysed in analyses.items()
    )
    return f'{{"systems": [\n{rows}\n],\n"analyses": {{\n{domains}\n}}}}\n'


def _usage(cost: Cost) -> dict[str, Any] | None:
    """What the run took, without its command, which the entry has already."""
    if cost.usage is None:
        return None
    return {key: value for key, value in asdict(cost.usage).items() if key != "command"}


def _without(cell: Cell) -> dict[str, Any] | None:
    if cell.without is None:
        return None
    differences = {
        f"bleu against {baseline}": [each.value, each.low, each.high]
        for baseline, each in cell.without.differences.items()
    }
    return {"line": cell.without.line, "bleu": cell.without.bleu, **differences}
