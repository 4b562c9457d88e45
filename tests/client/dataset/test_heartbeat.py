"""The thread of a plan ends before the interpreter does."""

import subprocess
import sys

FORGOTTEN = """
import threading
import torch
from forebay.dataset.heartbeat import Heartbeat

began = threading.Event()
numbers = torch.arange(1000)

def tell():
    began.set()
    for _ in range(20):
        (numbers + numbers).sum()
    return 0.0

heartbeats = [
    Heartbeat(f"beat {k}", tell, lambda error: None, lambda: print("ended"), lambda: 0.0)
    for k in range(2)
]
assert began.wait(60)
"""


def test_a_process_that_ends_with_a_plan_ends_well_and_says_so():
    """A thread that the interpreter stops inside of torch would abort the process."""
    done = subprocess.run(
        [sys.executable, "-c", FORGOTTEN], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("ended") == 2
