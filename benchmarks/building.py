"""What does building a datastore cost, compared with the forward pass that it needs?"""

import tempfile
from pathlib import Path

from benchmarks.workload import CACHE, Workload, arguments, in_turns, machine, print_table
from lightning_knnmt.retrieval import (
    DatastorePlan,
    Precision,
    batches_of,
    ensure_datastore,
    teacher_forced,
)


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    workload = Workload(options)
    model, tokenizer = workload.model, workload.tokenizer
    datamodule, corpus = workload.datamodule, workload.datamodule.train_corpus
    max_tokens = datamodule.eval_max_tokens
    print(f"{machine()}\n{datamodule.name}: {len(corpus.target_tokens):,} tokens\n")

    def forward() -> None:
        batches = batches_of(corpus, tokenizer.vocabulary, max_tokens)
        for _ in teacher_forced(model, batches, Precision()):
            pass

    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        path = Path(folder) / "datastore"
        plan = DatastorePlan(path.parent, path, rebuild=True, max_tokens=max_tokens)

        def build() -> None:
            ensure_datastore(model, tokenizer, corpus, plan)

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
