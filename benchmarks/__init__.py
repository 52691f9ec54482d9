"""Measurements, one file a question; each prints a table of medians and their ratios from one run.

    python -m benchmarks.decoding [--data DIR --source pt --target en]

Without --data they take the catalogue's Portuguese-English text (Home Assistant) and model
(Bergamot), which are downloaded. Machines are noisy: what is compared is measured in turns, within
one process.
"""

import os

from lightning_knnmt.allocator import keep_freed_memory

# As the entry points do, see train.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
keep_freed_memory()
