"""Results on a console: scores, how sure their differences are, and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_knnmt.evaluation.bootstrap import Difference, difference, resample
from lightning_knnmt.evaluation.results import ResultRow, ResultsError
from lightning_knnmt.evaluation.scoring import Bleu, ChrF, Metric, MetricName, sentence_chrf

MEDIUM_WORDS = range(5, 26)  # an example should say something, and be read at a glance
SIMILAR_WORDS = 0.5  # two references that share this much of their words say the same
METRIC_NAMES: dict[MetricName, str] = {"bleu": "BLEU", "chrf": "chrF"}
Lines = Sequence[str]


@dataclass(frozen=True)
class Example:
    """A sentence that two systems translate differently.

    Attributes:
        line: From 1.
    """

    line: int
    source: str
    reference: str
    base: str
    system: str
    base_chrf: float
    system_chrf: float

    @property
    def gain(self) -> float:
        return self.system_chrf - self.base_chrf


def print_comparison(
    console: Console,
    rows: Sequence[ResultRow],
    hypotheses: Mapping[str, Sequence[str]],
    sources: Sequence[str],
    references: Sequence[str],
) -> None:
    """Prints methods on one test set, how sure their differences are, retrieval's cost, examples.

    Args:
        console: Where to print.
        rows: First the one that the others are compared with; examples are of the last one.
        hypotheses: The translations, by the rows' methods.
        sources: The test set's lines.
        references: Their translations.
    """
    base, *others = rows
    console.print(_table(rows))
    metrics: tuple[Metric, ...] = (Bleu(base.bleu_tokenizer), ChrF())
    drawn = {
        row.method: [resample(hypotheses[row.method], references, metric) for metric in metrics]
        for row in (rows if others else ())
    }
    pairs = [(row, base) for row in others]
    if len(rows) > 2 and rows[-1].k is not None:
        pairs.append((rows[-1], rows[-2]))  # what retrieval adds to a tuned model
    worse = []
    for row, other in pairs:
        for ours, theirs in zip(drawn[row.method], drawn[other.method], strict=True):
            found = difference(ours, theirs)
            said = f"{row.method} - {other.method}: {describe_difference(found)}"
            console.print(Text(said), soft_wrap=True)
            if other is base and found.metric == "bleu" and found.high < 0:
                worse.append(describe_loss(row.method, base.method, found))
    for sentence in worse:
        console.print(Text(sentence, style="bold red"), soft_wrap=True)
    for row in (row for row in rows if row.k is not None):
        console.print(Text(f"{row.method}: {describe_retrieval(row)}"), soft_wrap=True)
    console.print(Text(f"BLEU|{base.bleu_signature}\nchrF2|{base.chrf_signature}\n", style="dim"))
    if others:
        names = base.method, others[-1].method
        base_lines, last_lines = (hypotheses[name] for name in names)
        side_by_side(console, sources, references, base_lines, last_lines, names)


def describe_difference(difference: Difference) -> str:
    """Says a difference with its interval in one line, and whether it hangs on one sentence."""
    verdict = (
        "may be chance"
        if not difference.excludes_zero
        else ("better" if difference.value > 0 else "worse")
    )
    said = (
        f"{METRIC_NAMES[difference.metric]} {difference.value:+.1f}, 95 % interval "
        f"[{difference.low:+.1f}, {difference.high:+.1f}] by paired bootstrap: {verdict}"
    )
    if difference.hangs_on_one_line:
        said += f"; it hangs on line {difference.line}: {difference.without:+.1f} without it"
    return said


def describe_loss(method: str, base: str, difference: Difference) -> str:
    """Says in one line that a system is worse than the one it was made from."""
    return (
        f"Warning: {method} is worse than {base} on this text, by {-difference.value:.1f} BLEU "
        f"(95 % interval {-difference.high:.1f} to {-difference.low:.1f})."
    )


def describe_retrieval(row: ResultRow) -> str:
    """Says with which values, index and datastore a row was decoded, in one line."""
    size = None if row.datastore_bytes is None else row.datastore_bytes / 2**20
    parts = (
        ("k = {}", row.k),
        ("λ = {:g}", row.knn_weight),
        ("T = {:g}", row.temperature),
        ("peak = {:g}", row.peak),
        ("reach = {:g}", row.reach),
        ("combiner of {:,} parameters", row.combiner_parameters),
        ("trained in {:.1f} s", row.combiner_seconds),
        ("index {}", row.index),
        (f"recall@{row.k} {{:.3f}}", row.recall_at_k),
        ("datastore {:,} entries", row.datastore_entries),
        ("{:,.1f} MiB", size),
    )
    return "; ".join(form.format(value) for form, value in parts if value is not None)


def choose_examples(
    sources: Lines, references: Lines, base: Lines, system: Lines, better: int = 3, worse: int = 1
) -> tuple[list[Example], list[Example]]:
    """Chooses sentences that the system translates better, and some that it translates worse.

    The largest differences of sentence chrF come first, but sentences whose reference has 5 to 25
    words go before all others, and one that shares half of its words with a chosen one is left out.

    Returns:
        The better and the worse ones; fewer than asked for where there are no more.
    """
    if not len(sources) == len(references) == len(base) == len(system):
        raise ResultsError(
            f"There are {len(sources):,} sources, {len(references):,} references and "
            f"{len(base):,} and {len(system):,} translations: all must be of the same lines."
        )
    scores = sentence_chrf(base, references).tolist(), sentence_chrf(system, references).tolist()
    columns = zip(count(1), sources, references, base, system, *scores, strict=False)
    examples = [Example(*column) for column in columns]
    examples.sort(key=lambda x: (len(x.reference.split()) not in MEDIUM_WORDS, -abs(x.gain)))
    gains = _pick_distinct([x for x in examples if x.gain > 0], better, [])
    return gains, _pick_distinct([x for x in examples if x.gain < 0], worse, gains)


def side_by_side(
    console: Console,
    sources: Lines,
    references: Lines,
    base: Lines,
    system: Lines,
    names: tuple[str, str] = ("without", "with"),
    better: int = 3,
    worse: int = 1,
) -> None:
    """Prints sentences that the system translates better than the base, and some worse ones."""
    gains, losses = choose_examples(sources, references, base, system, better, worse)
    for verdict, examples in (("better", gains), ("worse", losses)):
        console.print(Text(f"Where {names[1]} is {verdict} than {names[0]}", style="bold"))
        if not examples:
            console.print("no sentence")
        for example in examples:
            console.print(_as_grid(example, names))
    console.print(Text("Chosen by sentence chrF (the numbers), medium lengths first.", style="dim"))


def _table(rows: Sequence[ResultRow]) -> Table:
    table = Table(title=Text(f"{rows[0].test_set}: {rows[0].sentences:,} sentences"))
    table.add_column("method")
    for name in ("BLEU", "chrF", "sentences/s", "tokens/s"):
        table.add_column(name, justify="right")
    for row in rows:
        speeds = f"{row.sentences_per_second:,.1f}", f"{row.tokens_per_second:,.0f}"
        table.add_row(Text(row.method), f"{row.bleu:.1f}", f"{row.chrf:.1f}", *speeds)
    return table


def _as_grid(example: Example, names: tuple[str, str]) -> Table:
    # Text objects, because rich would take "[name]" in a translation for its own mark-up.
    width = max(map(len, names))
    grid = Table.grid(padding=(0, 2))
    for label, text in (
        (f"line {example.line}", example.source),
        ("reference", example.reference),
        (f"{names[0]:{width}} {example.base_chrf:3.0f}", example.base),
        (f"{names[1]:{width}} {example.system_chrf:3.0f}", example.system),
        ("", ""),
    ):
        grid.add_row(Text(label, style="dim"), Text(text))
    return grid


def _pick_distinct(
    ranked: Sequence[Example], number: int, others: Sequence[Example]
) -> list[Example]:
    chosen: list[Example] = []
    for example in ranked:
        is_new = not any(_are_similar(example, other) for other in (*others, *chosen))
        if len(chosen) < number and is_new:
            chosen.append(example)
    return chosen


def _are_similar(one: Example, other: Example) -> bool:
    words, others = (set(x.reference.lower().split()) for x in (one, other))
    return len(words & others) >= SIMILAR_WORDS * len(words | others)
