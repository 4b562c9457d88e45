"""A process that streams much holds little: a tenth of 50 GB through 2 GB and 300 MB more."""

import os
import subprocess
import sys

import pytest

import forebay
from forebay_server.testing.daemon import DaemonProcess

ROW_BYTES = 65536
NUM_ROWS = 5 * 2**30 // ROW_BYTES
BUDGET_BYTES = 200 * 2**20
SLACK_BYTES = 300 * 2**20

WRITER = """
import sys
import numpy as np
import forebay
with forebay.connect(sys.argv[1]) as client:
    schema = {"x": forebay.Array("uint8", (int(sys.argv[2]),))}
    with client.create_dataset("large", schema=schema) as writer:
        row = np.random.default_rng(0).integers(0, 255, int(sys.argv[2]), dtype=np.uint8)
        for _ in range(int(sys.argv[3])):
            writer.write(x=row)
"""

READER = """
import sys
import forebay, torch
from forebay import DataLoader

def held():
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))

with forebay.connect(sys.argv[1]) as client:
    dataset = client.dataset("large")
    before, most, num_bytes = held(), 0, 0
    budget = int(sys.argv[3])
    with DataLoader(
        dataset, global_batch_size=128, shuffle=sys.argv[2], memory_budget=budget
    ) as loader:
        for batch in loader:
            num_bytes += batch["x"].nbytes
            most = max(most, held() - before)
print(num_bytes, most)
"""


def run(program, *words, **environment) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, words)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_gigabytes_go_through_little_memory(tmp_path):
    with DaemonProcess(tmp_path / "data", "--object-url", "none") as daemon:
        address = daemon.address()["rpc"]
        run(WRITER, address, ROW_BYTES, NUM_ROWS)
        for no_local in ("", "1"):
            for shuffle in ("none", "full"):
                told = run(READER, address, shuffle, BUDGET_BYTES, FOREBAY_NO_LOCAL=no_local)
                num_bytes, most = map(int, told.split())
                assert num_bytes == NUM_ROWS * ROW_BYTES
                assert most < BUDGET_BYTES + SLACK_BYTES, (no_local, shuffle, most)
        with forebay.connect(address) as client:
            client.delete_dataset("large", now=True)
