"""Attributes computed once, without a lock that a fork could leave held."""

import os
import signal
import threading
from dataclasses import dataclass

import pytest

from forebay_wire.lazy import lazy

computing = threading.Event()
go_on = threading.Event()


@dataclass(frozen=True)
class Thing:
    number: int

    @lazy
    def double(self) -> int:
        """Twice the number."""
        if self.number == 0:
            computing.set()
            go_on.wait(60)
        return 2 * self.number


def test_a_value_is_computed_at_first_use_and_kept():
    thing = Thing(21)
    assert "double" not in thing.__dict__
    assert thing.double == thing.double == 42
    assert thing.__dict__["double"] == 42
    assert Thing.double.__doc__ == "Twice the number."


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # that is the point
def test_a_child_forked_while_a_thread_computes_does_not_wait_for_it():
    thread = threading.Thread(target=lambda: Thing(0).double)
    thread.start()
    computing.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(Thing(3).double)
    status = os.waitpid(child, 0)[1]
    go_on.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 6
