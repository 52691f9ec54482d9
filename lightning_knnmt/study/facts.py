"""A report's numbers for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import numpy as np

from lightning_knnmt.study.collect import Cell, Cost


def list_facts(cells: Sequence[Cell], costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """All that is known of every system on every test set, for JSON."""
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
    """A report's JSON: `systems` and, by domain, `analyses`; one line an entry."""

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


def plain(value: Any) -> Any:
    """An analysis' result for JSON: numbers of six digits, keys of several parts as one text."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {
            " ".join(map(str, key)) if isinstance(key, tuple) else str(key): plain(each)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}")
    return value


def _usage(cost: Cost) -> dict[str, Any] | None:
    """What the run took; its command is the fact's own, but for the folder."""
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
