"""A child that is forked while other threads are in Arrow or in an import reads at once."""

import pickle
import subprocess
import sys

import pytest

NUM_FORKS = 60

PROGRAM = """
import os, pickle, signal, sys, threading
import forebay
dataset = pickle.load(sys.stdin.buffer)
import numpy as np
import pyarrow as pa

def allocate():
    for _ in range(50):
        pa.array(range(100)).take(pa.array([1, 2, 3]))

def keep_allocating():  # in threads of their own, as each new one takes Arrow's locks
    while True:
        threads = [threading.Thread(target=allocate) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

threading.Thread(target=keep_allocating, daemon=True).start()
threading.Thread(target=lambda: __import__("pandas"), daemon=True).start()
rows = np.arange(40)
for _ in range(int(sys.argv[1])):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        batch = dataset.read(rows)
        os._exit(0 if batch["number"].tolist() == rows.tolist() else 3)
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"a child ended with {os.waitstatus_to_exitcode(status)}")
os._exit(0)
"""


@pytest.fixture
def way() -> str:
    return "local"


def test_children_of_a_parent_that_allocates_and_imports_read_at_once(numbered):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(NUM_FORKS)],
        input=pickle.dumps(numbered),
        capture_output=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
