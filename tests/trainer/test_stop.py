"""A wish to end is one, however many signals tell it at once."""

import signal
import subprocess
import sys

PROGRAM = """
import signal, sys, time
from forebay_trainer.stop import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    stop.wait(60)
    print("told", flush=True)
    sys.stdin.readline()
    print("left", flush=True)
"""


def start():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def test_signals_that_come_together_are_one():
    with start() as process:
        for _ in range(20):
            process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "told\n"
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stdout.readline() == "left\n"
        assert process.wait(60) == 0


def test_a_second_signal_ends_the_process_at_once():
    with start() as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "told\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
