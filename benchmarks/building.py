"""What does building a datastore cost over the forward pass that it cannot do without?"""

import contextlib
import tempfile
from pathlib import Path

from benchmarks.workload import CACHE, Workload, arguments, in_turns, machine, print_table
from lightning_knnmt.callbacks import build_datastore, fingerprint, teacher_forced


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    workload = Workload(options)
    model, datamodule = workload.module.model, workload.datamodule
    trainer = workload.trainer()
    entries = int(datamodule.train_corpus.target_offsets[-1])
    print(f"{machine()}\n{datamodule.name}: {entries:,} entries\n")

    def forward() -> None:
        for _ in teacher_forced(model, datamodule.datastore_dataloader(), contextlib.nullcontext()):
            pass

    with tempfile.TemporaryDirectory(dir=CACHE) as folder:

        def build() -> None:
            build_datastore(
                Path(folder) / "datastore",
                model,
                datamodule,
                model_fingerprint=fingerprint(model),
                trainer=trainer,
            )

        seconds = in_turns(options.repeats, forward=forward, build=build)
    rows = [
        (name, f"{value:.1f}", f"{entries / value:.0f}", f"{value / seconds['forward']:.2f}")
        for name, value in seconds.items()
    ]
    print_table(("what", "seconds", "tokens/s", "over forward"), rows)


if __name__ == "__main__":
    main()
