"""A study's numbers as Markdown tables: quality in and out of the domain, costs, runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lightning_knnmt.evaluation.bootstrap import Difference
from lightning_knnmt.study.collect import BASELINES, Cell, Cost
from lightning_knnmt.study.plan import Study
from lightning_knnmt.study.runner import minutes

Found = Mapping[tuple[str, str], Cell]  # by method and test set


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def interval(difference: Difference | None) -> str:
    """A difference for people: +1.2 [+0.8, +1.6]; empty if there is none."""
    if difference is None:
        return ""
    return f"{difference.value:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def quality_tables(cells: Sequence[Cell]) -> Iterator[str]:
    """BLEU and chrF of the systems of one domain, on its own test set, then on the others."""
    methods = list(dict.fromkeys(cell.method for cell in cells))
    own, *others = dict.fromkeys(cell.test_set for cell in cells)
    found = {(cell.method, cell.test_set): cell for cell in cells}
    compared = [b for b in BASELINES if b in methods]
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
    if not others:
        return
    yield f"On other text, in brackets the difference to {BASELINES[0]}:"
    header = [f"{metric} on {test_set}" for metric in ("BLEU", "chrF") for test_set in others]
    rows = []
    for method in methods:
        row = [method]
        for metric in ("bleu", "chrf"):
            for test_set in others:
                cell = found[method, test_set]
                score = cell.row.bleu if metric == "bleu" else cell.row.chrf
                row.append(_with_interval(score, cell.differences.get((metric, BASELINES[0]))))
        rows.append(row)
    yield markdown_table(["method", *header], rows)


def comparison_table(cells: Sequence[Cell], study: Study) -> Iterator[str]:
    """Paired differences of BLEU: to full fine-tuning on other text, and those the study asks for.

    Args:
        cells: Of one domain.
        study: With `comparisons`.
    """
    methods = list(dict.fromkeys(cell.method for cell in cells))
    tests = list(dict.fromkeys(cell.test_set for cell in cells))
    found = {(cell.method, cell.test_set): cell for cell in cells}
    pairs = [*study.comparisons, *((m, b) for b in BASELINES[1:] for m in methods if m != b)]
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


def without_lines(cells: Sequence[Cell]) -> Iterator[str]:
    """BLEU without single lines, of the test sets where some difference hangs on one."""
    for test_set in dict.fromkeys(cell.test_set for cell in cells):
        found = [(cell.method, cell.without) for cell in cells if cell.test_set == test_set]
        known = [(method, without) for method, without in found if without is not None]
        if not known:
            continue
        compared = [b for b in BASELINES if any(b in each.differences for _, each in known)]
        yield (
            f"Line {known[0][1].line:,} of {test_set}'s test set decides: leaving it out moves "
            "differences of BLEU by more than half a point and a quarter of their intervals. "
            "Without it:"
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
    """What the systems of one domain cost, and their settings.

    Args:
        speeds: Of decoding, relative to NMT, by method; may be empty.
    """
    header = ["method", "trained parameters", "training", "decoding speed / NMT"]
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
        rows.append(
            [
                cell.method,
                f"{parameters:,}",
                minutes(seconds) if seconds else "",
                f"{speeds[cell.method]:.2f}" if cell.method in speeds else "",
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


def _retrieval(cell: Cell) -> str:
    row = cell.row
    parts = (
        ("k {}", row.k),
        ("λ {:g}", row.knn_weight),
        ("T {:g}", row.temperature),
        ("{:,} entries", row.datastore_entries),
    )
    return ", ".join(form.format(value) for form, value in parts if value is not None)


def _with_interval(value: float, difference: Difference | None) -> str:
    return f"{value:.2f} ({interval(difference)})" if difference else f"{value:.2f}"
