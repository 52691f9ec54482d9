"""What do adapters cost in decoding? The same sentences with and without them, in turns.

Untrained adapters are the identity, so all systems write the same tokens.

python -m benchmarks.adapters
"""

import copy
import functools

from benchmarks.workload import Workload, arguments, in_turns, machine, print_table
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.models import Transformer


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument(
        "--every", type=int, default=1, help="time every n-th batch of the test set"
    )
    options = parser.parse_args()
    workload = Workload(options)
    models = {"none": workload.model}
    for dim in options.dims:
        model = copy.deepcopy(workload.model)
        model.insert_adapters(dim)
        models[f"{dim}"] = model.eval()
    print(f"{machine()}\n{workload.datamodule.name}\n")

    def translate(search: BeamSearch, model: Transformer) -> list[list[int]]:
        return workload.translate(search, workload.base_of(model), options.every, model)

    rows = []
    for beam_size in options.beams:
        search = BeamSearch(beam_size=beam_size)
        tasks = {
            f"r{name}": functools.partial(translate, search, each) for name, each in models.items()
        }
        written = {name: task() for name, task in tasks.items()}
        assert all(each == written["rnone"] for each in written.values()), "not the identity"
        timed = in_turns(options.repeats, warm=True, **tasks)
        for name, (wall, cpu) in timed.items():
            ratios = wall / timed["rnone"].wall, cpu / timed["rnone"].cpu
            size = sum(p.numel() for p in models[name[1:]].parameters())
            rows.append((name[1:], f"{size:,}", beam_size, *(f"{each:.2f}" for each in ratios)))
    print_table(("r", "parameters", "beam", "over none", "processor over none"), rows)


if __name__ == "__main__":
    main()
