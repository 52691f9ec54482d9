"""What does retrieval cost in decoding? Time per generated token with it, over time without it.

The same sentences in one process, in turns; BLEU with the chosen index and with exact search.
"""

import functools

from benchmarks.workload import Workload, arguments, in_turns, machine, print_table
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.retrieval import AutoChoice, FixedCombiner, FlatChoice

HEADER = (
    *("beam", "method", "BLEU", "tokens"),
    *("µs per token", "over NMT", "processor µs per token", "over NMT"),
)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--knn-weight", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=30.0)
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--exact-beams", type=int, nargs="*", default=[1], help="slow: BLEU only")
    parser.add_argument(
        "--every", type=int, default=1, help="time every n-th batch of the test set"
    )
    options = parser.parse_args()
    workload = Workload(options)
    nmt = workload.base
    auto, exact = (
        workload.validation(choice).index_for(options.k)
        for choice in (AutoChoice(options.recall), FlatChoice())
    )
    fixed = FixedCombiner(options.k, options.knn_weight, options.temperature)
    approximate, true = (workload.mixed(each.index, fixed) for each in (auto, exact))
    print(f"{machine()}\n{workload.datamodule.name}: {len(workload.datastore):,} entries, {fixed}")
    print(f"{auto.index.description}, recall@{options.k} {auto.recall_at_k:.3f}\n")

    rows = []
    for beam_size in options.beams:
        search = BeamSearch(beam_size=beam_size)
        outputs = {
            "NMT": workload.translate(search, nmt),
            "kNN-MT": workload.translate(search, approximate),
        }
        if beam_size in options.exact_beams:
            outputs["kNN-MT, exact"] = workload.translate(search, true)
        tasks = {
            name: functools.partial(workload.translate, search, distribution, options.every)
            for name, distribution in (("NMT", nmt), ("kNN-MT", approximate))
        }
        tokens = {name: sum(map(len, task())) for name, task in tasks.items()}
        seconds = in_turns(options.repeats, warm=True, **tasks)
        for name, output in outputs.items():
            row = [beam_size, name, f"{workload.bleu(output):.2f}", sum(map(len, output))]
            if name in seconds:
                wall, cpu = (each / tokens[name] for each in seconds[name])
                base_wall, base_cpu = (each / tokens["NMT"] for each in seconds["NMT"])
                row += [f"{1e6 * wall:.0f}", f"{wall / base_wall:.2f}"]
                row += [f"{1e6 * cpu:.0f}", f"{cpu / base_cpu:.2f}"]
            rows.append(row + [""] * (len(HEADER) - len(row)))
            print_table(HEADER, rows[-1:])
    print_table(HEADER, rows)


if __name__ == "__main__":
    main()
