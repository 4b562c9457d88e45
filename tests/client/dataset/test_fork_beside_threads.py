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

PANDAS = """
import sys, time
sys.is_importing.set()
time.sleep(60)
"""

IMPORTING = """
import os, pickle, signal, sys, threading
import forebay
dataset, column, folder = pickle.load(sys.stdin.buffer)
packed = forebay.Packed(dataset, column=column, length=16)
sys.is_importing = threading.Event()
sys.path.insert(0, folder)
threading.Thread(target=lambda: __import__("pandas"), daemon=True).start()
sys.is_importing.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    loader = forebay.DataLoader(packed, batch_size=4, num_threads=0, rank=0, world_size=1)
    os._exit(0 if sum(len(batch[column]) for batch in loader) else 3)
_, status = os.waitpid(child, 0)
sys.stderr.write(f"the child ended with {os.waitstatus_to_exitcode(status)}")
sys.stderr.flush()
os._exit(status != 0)
"""


@pytest.fixture
def way(request, monkeypatch) -> str:
    """By descriptors, unless a test asks for HTTP."""
    asked: str = getattr(request, "param", "local")
    if asked == "remote":
        monkeypatch.setenv("FOREBAY_NO_LOCAL", "1")
    return asked


def test_children_of_a_parent_that_allocates_and_imports_read_at_once(numbered):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(NUM_FORKS)],
        input=pickle.dumps(numbered),
        capture_output=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]


@pytest.mark.parametrize("way", ["local", "remote"], indirect=True)
def test_a_child_packs_tokens_while_its_parent_imports_pandas(client, name, tmp_path):
    with client.create_dataset(name, schema={"tokens": "list[uint16]"}) as writer:
        for number in range(60):
            writer.write(tokens=list(range(number % 37)))
    (tmp_path / "pandas.py").write_text(PANDAS)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORTING],
        input=pickle.dumps((client.dataset(name), "tokens", str(tmp_path))),
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
