"""How fast is exact search, ours in torch compared with faiss.IndexFlatL2?"""

import faiss
import numpy as np
import torch

from benchmarks.workload import Workload, arguments, in_turns, machine, print_table
from lightning_knnmt.retrieval import FlatChoice, FlatIndex


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256])
    options = parser.parse_args()
    workload = Workload(options)
    keys = np.ascontiguousarray(workload.datastore.keys, dtype=np.float32)
    queries = workload.validation(FlatChoice()).queries()
    faiss.omp_set_num_threads(torch.get_num_threads())
    theirs = faiss.IndexFlatL2(keys.shape[1])
    theirs.add(keys)
    ours = FlatIndex(keys, "l2")
    print(f"{machine()}\n{len(keys):,} entries of {keys.shape[1]} dimensions, k {options.k}\n")

    shipped = 128000  # faiss 1.15's threshold; the package sets it to 2000
    rows = []
    for size in options.batches:
        batch = queries[torch.randperm(len(queries))[:size]].half().float()
        distances, _ = ours.search(batch, options.k)
        expected, _ = theirs.search(batch.numpy(), options.k)
        torch.testing.assert_close(distances, torch.from_numpy(expected), rtol=1e-3, atol=0.05)

        def with_threshold(threshold: int, batch: torch.Tensor = batch) -> None:
            faiss.cvar.distance_compute_blas_threshold = threshold
            theirs.search(batch.numpy(), options.k)

        timed = in_turns(
            options.repeats,
            ours=lambda batch=batch: ours.search(batch, options.k),
            faiss=lambda: with_threshold(2000),
            faiss_as_shipped=lambda: with_threshold(shipped),
        )
        rows.append(
            (
                size,
                *(f"{1e3 * each.wall:.0f}" for each in timed.values()),
                *(f"{timed[name].wall / timed['ours'].wall:.2f}" for name in list(timed)[1:]),
            )
        )
    header = ("batch", "ours, ms", "faiss, ms", "faiss as shipped, ms")
    print_table((*header, "faiss / ours", "as shipped / ours"), rows)


if __name__ == "__main__":
    main()
