"""A run changes how memory is taken from the system, for itself alone: what a process does afterwards is as fast."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
torch.set_num_threads(1)
from cluscomp_peft import ClusCompQuantizationConfig
from cluscomp_peft.compress.stream.shards import small_memory, trim_memory
from cluscomp_peft.compress.checkpoint import compress_checkpoint

def faults():
    torch.empty(30 << 20, dtype=torch.uint8).fill_(1)  # a training step has taken and freed its largest by now
    trim_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(24 << 20, dtype=torch.uint8).fill_(1)  # no hole of the heap is as large
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

own = faults()
with small_memory():
    with small_memory():
        pass
    during = faults()
config = ClusCompQuantizationConfig(group_size=3, num_clusters=12, quality="fast")
compress_checkpoint(sys.argv[1], sys.argv[2], config)
print(own, during, faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_is_taken_as_before_once_a_run_is_over(dense_dir, tmp_path):
    """Page faults of twenty tensors of 24 MiB, one after the other: taken from a heap, they share their pages."""
    command = [sys.executable, "-c", SCRIPT, dense_dir, str(tmp_path / "out")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    own, during, afterwards = map(int, output.splitlines()[-1].split())
    assert during > 20 * 6000  # each from the system: 6144 pages, which is what the measurement has to see
    assert own < 20000 and afterwards < 20000
