"""A report's numbers for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

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
