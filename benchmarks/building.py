"""What does building a datastore cost over the forward pass that it cannot do without?"""

import contextlib
import tempfile
from pathlib import Path

from benchmarks.workload import CACHE, Workload, arguments, in_turns, machine, print_table
from lightning_knnmt.training import build_datastore, fingerprint, teacher_forced


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

        timed = in_turns(options.repeats, forward=forward, build=build)
    base = timed["forward"]
    rows = [
        (name, f"{wall:.1f}", f"{wall / base.wall:.2f}", f"{cpu:.1f}", f"{cpu / base.cpu:.2f}")
        for name, (wall, cpu) in timed.items()
    ]
    header = ("what", "seconds", "over forward", "processor seconds", "over forward")
    print_table(header, rows)


if __name__ == "__main__":
    main()
