"""What the benchmarks measure: a pretrained model, a corpus, its datastore."""

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from lightning_knnmt import load_pretrained
from lightning_knnmt.data import Batch, ParallelDataModule, prepare_corpus, prepare_model
from lightning_knnmt.decoding import (
    BeamSearch,
    NextTokenDistribution,
    SoftmaxDistribution,
    translate_batches,
)
from lightning_knnmt.evaluation.scoring import Bleu
from lightning_knnmt.files import default_cache
from lightning_knnmt.models import Transformer
from lightning_knnmt.retrieval import (
    Combiner,
    Datastore,
    DatastorePlan,
    Index,
    IndexChoice,
    KNNDistribution,
    LocalSource,
    Precision,
    Retriever,
    TuningText,
    ensure_datastore,
)

CACHE = default_cache()


def arguments(description: str) -> argparse.ArgumentParser:
    """The options of all benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, help="folder of {train,valid,test}.{pt,en}")
    parser.add_argument("--source", default="pt", help="ending of the source files")
    parser.add_argument("--target", default="en", help="ending of the target files")
    parser.add_argument("--model", type=Path, help="another pretrained model or checkpoint")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each task")
    return parser


class Workload:
    """A model, its text, and the datastore of its training text.

    Attributes:
        model: The pretrained model.
        tokenizer: The model's own.
        datamodule: The text.
        batches: Of the test set.
        base: The model's own distribution.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        path = options.model or prepare_model("bergamot_pt_en", CACHE)
        self.model, self.tokenizer = load_pretrained(path)
        root = options.data or prepare_corpus("smarthome_pt_en", CACHE)
        self.datamodule = ParallelDataModule(
            root, options.source, options.target, tokenizer=self.tokenizer, cache_dir=CACHE
        )
        self.batches: list[Batch] = list(self.datamodule.test_dataloader())
        self.base = self.base_of(self.model)
        self.metric = Bleu.for_language(self.datamodule.target_lang)

    def base_of(self, model: Transformer) -> SoftmaxDistribution:
        """A model's own distribution."""
        never = self.tokenizer.vocabulary.never_emitted
        return SoftmaxDistribution(model.output_projection, never)

    @functools.cached_property
    def datastore(self) -> Datastore:
        """The datastore of the training text, built unless it exists."""
        plan = DatastorePlan(CACHE / "datastores")
        return ensure_datastore(self.model, self.tokenizer, self.datamodule.train_corpus, plan)

    def validation(self, index: IndexChoice) -> TuningText:
        """The validation text, with its queries and records."""
        return TuningText(
            self.model,
            self.tokenizer,
            self.datamodule.valid_corpus,
            self.datastore,
            index,
            "l2",
            precision=Precision(),
            max_tokens=self.datamodule.eval_max_tokens,
        )

    def mixed(self, index: Index, combiner: Combiner) -> KNNDistribution:
        """The model's distribution mixed with what the datastore says."""
        source = LocalSource(index, self.datastore.values)
        return KNNDistribution(self.base, Retriever(source, combiner.num_neighbours), combiner)

    def translate(
        self,
        search: BeamSearch,
        distribution: NextTokenDistribution,
        every: int = 1,
        model: Transformer | None = None,
    ) -> list[list[int]]:
        """The translations of every n-th batch of the test set, in the corpus's order."""
        batches = self.batches[::every]
        vocabulary = self.tokenizer.vocabulary
        found = dict(
            translate_batches(model or self.model, vocabulary, batches, search, distribution)
        )
        return [found[i][0].tokens for i in sorted(found)]

    def bleu(self, translations: Sequence[Sequence[int]]) -> float:
        texts = [self.tokenizer.decode(ids) for ids in translations]
        return self.bleu_of(texts)

    def bleu_of(self, texts: Sequence[str]) -> float:
        return self.metric.score(texts, self.datamodule.references("test")).value


class Seconds(NamedTuple):
    """Medians of several runs: elapsed time, and this process's processor time."""

    wall: float
    cpu: float


def in_turns(
    repeats: int, *, warm: bool = False, **tasks: Callable[[], object]
) -> dict[str, Seconds]:
    """Times tasks in turns, so that all see the same noise.

    If other programs use the cores too, processor time is the steadier measure.

    Args:
        repeats: Measurements of each task.
        warm: Whether the tasks have run before; if not, each runs once unmeasured.
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
    """The processor, for captions."""
    info = Path("/proc/cpuinfo")
    model = platform.processor() or platform.machine()
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    flags = "AVX-512" if "avx512f" in info.read_text() else "AVX2"
    return f"{model} ({flags}), {torch.get_num_threads()} threads, torch {torch.__version__}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a Markdown table, ready for docs/results."""
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print(flush=True)
