"""How does search time grow with the datastore, at a given recall? A table and a figure."""

from pathlib import Path

import numpy as np

from benchmarks.workload import Workload, arguments, machine, print_table
from lightning_knnmt.retrieval import FlatChoice, choose_index


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--entries", type=int, nargs="+", default=[50_000, 200_000, 600_000])
    parser.add_argument("--picture", type=Path, default=Path("docs/results/growth.png"))
    options = parser.parse_args()
    workload = Workload(options)
    keys, queries = workload.datastore.keys, workload.validation(FlatChoice()).queries()
    print(f"{machine()}\n{workload.datamodule.name}, recall@{options.k} {options.recall}\n")

    rows, curve = [], []
    for entries in options.entries:
        if entries > len(keys):
            print(f"(no {entries:,} entries: the datastore has {len(keys):,})")
            continue
        # A random part of the text: the first sentences are the longest.
        part = np.sort(np.random.default_rng(1).choice(len(keys), entries, replace=False))
        _, report = choose_index(keys[part], queries, options.k, recall=options.recall)
        exact, choice = report.candidates[0], report.choice
        curve.append((entries, choice.milliseconds_per_query, exact.milliseconds_per_query))
        rows.append(
            (
                f"{entries:,}",
                choice.description,
                f"{choice.recall:.3f}",
                f"{1e3 * choice.milliseconds_per_query:.0f}",
                f"{1e3 * exact.milliseconds_per_query:.0f}",
                f"{exact.milliseconds_per_query / choice.milliseconds_per_query:.0f}",
            )
        )
    header = ("entries", "index", "recall", "µs per query", "exact, µs per query", "exact / chosen")
    print_table(header, rows)
    draw(curve, options.picture, f"recall@{options.k} at least {options.recall}")


def draw(curve: list[tuple[int, float, float]], path: Path, title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    entries, chosen, exact = zip(*curve, strict=True)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(entries, exact, "o-", label="exact (torch)")
    axes.plot(entries, chosen, "o-", label="chosen index")
    axes.set(
        xscale="log", yscale="log", xlabel="datastore entries", ylabel="ms per query", title=title
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
