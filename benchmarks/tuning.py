"""What does a grid of (k, λ, T) cost over the one recorded pass that it is scored from?"""

from benchmarks.workload import Workload, arguments, in_turns, machine, print_table
from lightning_knnmt.retrieval import AutoChoice, Record, Recorder, Retriever
from lightning_knnmt.retrieval.tuning import (
    KNN_WEIGHTS,
    neighbour_counts,
    score_grid,
    temperatures_for,
)
from lightning_knnmt.training import ValidationPass


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--max-neighbours", type=int, default=32)
    options = parser.parse_args()
    workload = Workload(options)
    nmt = workload.module.nmt_distribution
    retrieval = workload.retrieval(AutoChoice(), num_neighbours=options.max_neighbours)
    index, values = retrieval.measured_index.index, retrieval.datastore.values
    retriever = Retriever(values, index, options.max_neighbours)

    def record() -> Record:
        recorder = Recorder(retriever, nmt)
        validation = ValidationPass(workload.module, workload.datamodule, workload.trainer())
        validation.record_into(recorder)
        return recorder.finish()

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
