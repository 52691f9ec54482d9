import subprocess
import sys

import pytest

COUNT_PAGE_FAULTS = """
import resource
import sys
import numpy as np
from lightning_knnmt.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for step in range(4):
    if step == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2 << 20)  # 16 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    """Of three arrays of 16 MiB, each freed before the next is made."""
    command = [sys.executable, "-c", COUNT_PAGE_FAULTS, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is what is told to keep memory")
def test_freed_memory_is_taken_again_without_asking_the_system() -> None:
    assert 20 * page_faults("keep") < page_faults("default")
