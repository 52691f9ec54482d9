"""Does training from scratch learn? Runs `train.py` on real text and reports its test BLEU.

python -m benchmarks.training --data DIR --source de --target en --minutes 18
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.workload import arguments, machine, print_table

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--minutes", type=int, default=18, help="of training")
    parser.add_argument("--name", default="benchmark_training", help="the run's folder in outputs/")
    parser.add_argument("overrides", nargs="*", help="further overrides of train.py")
    options = parser.parse_args()
    if options.data is None:
        parser.error("--data is required: the catalogue has no text to train a model from scratch")
    command = [
        *(sys.executable, "train.py", f"name={options.name}", "module=nmt"),
        *("model=transformer_tiny", "data=text", f"data.root={options.data}"),
        *(f"data.source_lang={options.source}", f"data.target_lang={options.target}"),
        *(f"trainer.max_time=00:00:{options.minutes:02d}:00", "trainer.max_epochs=100"),
        *options.overrides,
    ]
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    minutes = (time.perf_counter() - started) / 60
    (row,) = json.loads((ROOT / "outputs" / options.name / "results.json").read_text())
    print(f"{machine()}\n{' '.join(command[1:])}\n")
    cells = (row["test_set"], f"{row['bleu']:.2f}", f"{row['chrf']:.2f}", f"{minutes:.1f}")
    print_table(("test set", "BLEU", "chrF", "minutes in total"), [cells])


if __name__ == "__main__":
    main()
