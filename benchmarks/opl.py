"""How long is an epoch of tuning the output projection, through the model and from the datastore?

Each way trains on some batches of an epoch as `train.py` does, with optimizer and clipping, without
validation; seconds per epoch are extrapolated by the number of target tokens. The ways take turns.
`first` is the epoch that also computes what the frozen rows add to the softmax.
"""

import functools
import statistics
import time
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch

from benchmarks.workload import Workload, arguments, machine, print_table
from lightning_knnmt.data import Batch, EntryBatchSampler, KeyDataset, ResumableDataLoader
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.training import OPLFineTuner


class EpochTimer(pl.Callback):
    """Elapsed time, processor time and target tokens of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[tuple[float, float, int]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.started, self.cpu_started = time.perf_counter(), time.process_time()
        self.tokens = 0

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, _: int
    ) -> None:
        self.tokens += (
            int(batch.label_mask.sum()) if isinstance(batch, Batch) else len(batch.labels)
        )

    def on_train_epoch_end(self, *_: Any) -> None:
        wall, cpu = time.perf_counter() - self.started, time.process_time() - self.cpu_started
        self.epochs.append((wall, cpu, self.tokens))


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--batches", type=int, default=4, help="measured batches of an epoch")
    parser.add_argument("--batch-size", type=int, default=2048, help="of the datastore's entries")
    options = parser.parse_args()
    workload = Workload(options)
    model, datamodule = workload.model, workload.datamodule
    datastore = workload.datastore
    entries, (vocab_size, dim) = len(datastore), model.output_projection.weight.shape
    seen = len(np.unique(datastore.values))
    print(f"{machine()}\n{datamodule.name}: {entries:,} entries of {dim} dimensions, ", end="")
    print(f"{seen:,} of {vocab_size:,} tokens seen; {options.batches} batches per epoch\n")

    part = np.random.default_rng(1).permutation(entries)[: options.batches * options.batch_size]
    dataset = KeyDataset(datastore.keys[part], datastore.values[part])
    sampler = EntryBatchSampler(len(part), options.batch_size)

    class Entries(pl.Callback):
        """Gives the datastore's entries to train on, in place of the text."""

        def training_batches(self, trainer: pl.Trainer) -> ResumableDataLoader:
            return ResumableDataLoader(dataset, batch_size=None, sampler=sampler)

    def epochs(way: Literal["text", "datastore"], rows: Literal["all", "seen"]) -> Any:
        adam = functools.partial(torch.optim.Adam, lr=1e-30)  # it moves nothing
        module = OPLFineTuner(
            model,
            workload.tokenizer,
            BeamSearch(),
            optimizer=adam,
            rows=rows,
            warmup_steps=0,
            label_smoothing=0.0,
        )
        timer = EpochTimer()
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, gradient_clip_val=1.0,
            max_epochs=2 if rows == "seen" else 1, limit_val_batches=0, num_sanity_val_steps=0,
            limit_train_batches=options.batches,
            callbacks=[timer, Entries()] if way == "datastore" else [timer],
        )  # fmt: skip
        trainer.fit(module, datamodule=datamodule)
        return [(wall / n * entries, cpu / n * entries) for wall, cpu, n in timer.epochs]

    measured: dict[str, list[tuple[float, float]]] = {}
    for turn in range(options.repeats + 1):
        found = {
            "through the model": epochs("text", "all")[0],
            "datastore, rows=all": epochs("datastore", "all")[0],
        }
        found["datastore, rows=seen, first"], found["datastore, rows=seen"] = epochs(
            "datastore", "seen"
        )
        for name, seconds in found.items() if turn else ():  # the first turn only warms
            measured.setdefault(name, []).append(seconds)

    medians = {
        name: [statistics.median(column) for column in zip(*seconds, strict=True)]
        for name, seconds in measured.items()
    }
    base_wall, base_cpu = medians["through the model"]
    rows = [
        (name, f"{wall:.0f}", f"{base_wall / wall:.1f}", f"{cpu:.0f}", f"{base_cpu / cpu:.1f}")
        for name, (wall, cpu) in medians.items()
    ]
    print_table(("epoch", "seconds", "times faster", "processor seconds", "times faster"), rows)
    products = {"rows=all": 2 * dim * vocab_size, "rows=seen": 2 * dim * seen}
    for name, count in products.items():
        print(f"{name}: {count / 1e6:.1f}M multiply-adds per entry in the two products")


if __name__ == "__main__":
    main()
