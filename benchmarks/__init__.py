"""Measurements, one file a question; each prints a table of medians and their ratios from one run.

    python -m benchmarks.decoding [--data DIR --source pt --target en]

Without --data they take the catalogue's Portuguese-English text (Home Assistant) and model
(Bergamot), which are downloaded. Machines are noisy: what is compared is measured in turns, within
one process.
"""

import os

# As the entry points do, see train.py: before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from lightning_knnmt.terminal import keep_freed_memory

keep_freed_memory()
