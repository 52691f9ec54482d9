"""What does a trained combiner cost: its training, and decoding compared with a fixed k, λ and T?

Training is timed on the recorded validation set; decoding uses the same k and index, in turns.
"""

import functools

import torch

from benchmarks.workload import Workload, arguments, in_turns, machine, print_table
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.retrieval import (
    VARIANTS,
    AutoChoice,
    Combiner,
    CombinerTrainer,
    FixedCombiner,
    RobustCombiner,
    distance_offset,
    label_log_probs,
)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--ks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--temperature", type=float, default=30.0)
    parser.add_argument("--max-updates", type=int, default=5000)
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument(
        "--every", type=int, default=1, help="time every n-th batch of the test set"
    )
    options = parser.parse_args()
    workload = Workload(options)
    datastore, validation = workload.datastore, workload.validation(AutoChoice())
    trainer = CombinerTrainer(max_updates=options.max_updates)
    print(f"{machine()}\n{workload.datamodule.name}\n")

    trained, decoded = [], []
    for k in options.ks:
        index = validation.index_for(k).index
        record = validation.record(
            index, k, keep_best=max(kind.num_best for kind in VARIANTS.values())
        )
        offset = distance_offset(record, index.metric)
        combiners: dict[str, Combiner] = {"fixed": FixedCombiner(k, 0.5, options.temperature)}
        for name, kind in VARIANTS.items():
            torch.manual_seed(1)
            adaptive = kind(k, options.temperature, distance_offset=offset)
            if isinstance(adaptive, RobustCombiner):
                adaptive.label_log_probs = label_log_probs(
                    datastore.keys, datastore.values, workload.base, validation.device
                )
            training = trainer.train(adaptive, record)
            combiners[name] = adaptive.requires_grad_(False)
            losses = f"{training.history[0].loss:.3f}", f"{training.best_loss:.3f}"
            seconds = f"{training.seconds:.1f}"
            trained.append((name, k, f"{record.num_tokens:,}", training.updates, seconds, *losses))
        for beam_size in options.beams:
            search = BeamSearch(beam_size=beam_size)
            tasks = {
                name: functools.partial(
                    workload.translate,
                    search,
                    workload.mixed(index, combiner),
                    options.every,
                )
                for name, combiner in combiners.items()
            }
            tokens = {name: sum(map(len, task())) for name, task in tasks.items()}
            timed = in_turns(options.repeats, warm=True, **tasks)
            base_wall, base_cpu = (each / tokens["fixed"] for each in timed["fixed"])
            for name, seconds_of in timed.items():
                wall, cpu = (each / tokens[name] for each in seconds_of)
                ratios = f"{wall / base_wall:.2f}", f"{cpu / base_cpu:.2f}"
                decoded.append((name, k, beam_size, f"{1e6 * wall:.0f}", *ratios))
    print_table(
        ("combiner", "k", "tokens", "updates", "seconds", "loss before", "loss after"), trained
    )
    print_table(
        ("combiner", "k", "beam", "µs per token", "over fixed", "processor over fixed"), decoded
    )


if __name__ == "__main__":
    main()
