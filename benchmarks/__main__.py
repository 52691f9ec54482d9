"""Runs the benchmarks that need only the catalogue's downloads, one process each.

The others need more packages or text: engine, generate, loading, growth, training.
"""

import subprocess
import sys

NAMES = ("decoding", "building", "tuning", "search", "combiner", "opl", "adapters")


def main() -> None:
    for name in NAMES:
        print(f"## python -m benchmarks.{name}\n", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
