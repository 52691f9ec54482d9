"""What the benchmarks measure on: a pretrained model, a corpus, its datastore."""

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch

from lightning_knnmt import load_pretrained
from lightning_knnmt.data import Batch, ParallelDataModule, prepare_corpus, prepare_model
from lightning_knnmt.decoding import BeamSearch, NextTokenDistribution
from lightning_knnmt.evaluation.scoring import Bleu
from lightning_knnmt.files import default_cache
from lightning_knnmt.retrieval import IndexChoice
from lightning_knnmt.training import CombinerChoice, FixedChoice, KNNCallback, NMTModule, Retrieval

CACHE = default_cache()


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, help="folder of {train,valid,test}.{pt,en}")
    parser.add_argument("--source", default="pt", help="ending of the source files")
    parser.add_argument("--target", default="en", help="ending of the target files")
    parser.add_argument("--model", type=Path, help="another pretrained model or checkpoint")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each thing")
    return parser


class Workload:
    """A module, its text, and the datastore of its training text."""

    def __init__(self, options: argparse.Namespace) -> None:
        path = options.model or prepare_model("bergamot_pt_en", CACHE)
        model, tokenizer = load_pretrained(path)
        root = options.data or prepare_corpus("smarthome_pt_en", CACHE)
        self.datamodule = ParallelDataModule(
            root, options.source, options.target, tokenizer=tokenizer, cache_dir=CACHE
        )
        adam = functools.partial(torch.optim.Adam, lr=0.0)
        self.module = NMTModule(model, tokenizer, BeamSearch(beam_size=1), optimizer=adam).eval()
        self.batches: list[Batch] = list(self.datamodule.test_dataloader())

    def retrieval(
        self, index: IndexChoice, num_neighbours: int, combiner: CombinerChoice | None = None
    ) -> Retrieval:
        """Builds (or finds) the datastore and an index over it, by default with fixed numbers."""
        choice = combiner or FixedChoice(num_neighbours, tune=False)
        knn = KNNCallback(CACHE / "datastores", index, choice)
        return knn.prepare(self.trainer(), self.module)

    def trainer(self) -> pl.Trainer:
        """A trainer that trains nothing, for those who ask it about devices and ranks."""
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        trainer.strategy.connect(self.module)
        trainer.datamodule = self.datamodule  # type: ignore[attr-defined]
        return trainer

    def translate(
        self, search: BeamSearch, distribution: NextTokenDistribution, every: int = 1
    ) -> list[list[int]]:
        """The translations of every n-th batch of the test set, in the corpus's order."""
        found: dict[int, list[int]] = {}
        for batch in self.batches[::every]:
            best = self.module.translate(batch, search, distribution)
            found.update((i, h.tokens) for i, h in zip(batch.index.tolist(), best, strict=True))
        return [found[i] for i in sorted(found)]

    def bleu(self, translations: Sequence[Sequence[int]]) -> float:
        texts = [self.module.tokenizer.decode(ids) for ids in translations]
        return self.bleu_of(texts)

    def bleu_of(self, texts: Sequence[str]) -> float:
        metric = Bleu.for_language(self.datamodule.target_lang)
        return metric.score(texts, self.datamodule.references("test")).value


class Seconds(NamedTuple):
    """Medians of several runs: what a clock says, and what the processor spent on this process."""

    wall: float
    cpu: float


def in_turns(
    repeats: int, *, warm: bool = False, **tasks: Callable[[], object]
) -> dict[str, Seconds]:
    """Times each task; the tasks alternate, so that all see the same noise.

    Where other programs want the cores too, the processor's seconds are the steadier measure.

    Args:
        repeats: Measurements of each task.
        warm: Whether the tasks have run before; else each runs once unmeasured.
        tasks: What to measure, by name.
    """
    seconds: dict[str, list[Seconds]] = {name: [] for name in tasks}
    for task in () if warm else tasks.values():
        task()
    for _ in range(repeats):
        for name, task in tasks.items():
            started = Seconds(time.perf_counter(), time.process_time())
            task()
            ended = Seconds(time.perf_counter(), time.process_time())
            seconds[name].append(Seconds(ended.wall - started.wall, ended.cpu - started.cpu))
    return {
        name: Seconds(*(statistics.median(column) for column in zip(*runs, strict=True)))
        for name, runs in seconds.items()
    }


def machine() -> str:
    """The processor, for the tables' captions."""
    info = Path("/proc/cpuinfo")
    model = platform.processor() or platform.machine()
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    flags = "AVX-512" if "avx512f" in info.read_text() else "AVX2"
    return f"{model} ({flags}), {torch.get_num_threads()} threads, torch {torch.__version__}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table, ready for docs/results."""
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print(flush=True)
