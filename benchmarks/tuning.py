"""What does a grid of (k, λ, T) cost, compared with the recorded pass that it is scored from?"""

from benchmarks.workload import Workload, arguments, in_turns, machine, print_table
from lightning_knnmt.retrieval import AutoChoice, Record
from lightning_knnmt.retrieval.tuning import (
    KNN_WEIGHTS,
    neighbour_counts,
    score_grid,
    temperatures_for,
)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--max-neighbours", type=int, default=32)
    options = parser.parse_args()
    workload = Workload(options)
    k = options.max_neighbours
    index = workload.validation(AutoChoice()).index_for(k).index

    def record() -> Record:
        return workload.validation(AutoChoice()).record(index, k)  # with a pass of its own

    recorded = record()
    temperatures = temperatures_for(recorded)
    settings = len(neighbour_counts(recorded)) * len(KNN_WEIGHTS) * len(temperatures)
    print(f"{machine()}\n{workload.datamodule.name}: {recorded.num_tokens:,} tokens recorded")
    print(f"{settings} settings, {index.description}\n")
    timed = in_turns(
        options.repeats,
        record=record,
        grid=lambda: score_grid(recorded, neighbour_counts(recorded), KNN_WEIGHTS, temperatures),
    )
    base = timed["record"].wall
    rows = [(n, f"{s.wall:.2f}", f"{s.wall / base:.3f}") for n, s in timed.items()]
    print_table(("what", "seconds", "over the recorded pass"), rows)


if __name__ == "__main__":
    main()
