"""Benchmarks, one file per question; each prints medians and their ratios from one run.

    python -m benchmarks.decoding [--data DIR --source pt --target en]

Without --data they use the catalogue's Portuguese-English text (Home Assistant) and model
(Bergamot), which are downloaded. Machines are noisy, so what is compared is measured in turns
within one process.
"""

import os

# Before torch is loaded, as in train.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from lightning_knnmt.terminal import keep_freed_memory

keep_freed_memory()
