"""Processes of single cases."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import pytest

from sparseflow.bench import process

pytestmark = pytest.mark.skipif(not hasattr(os, "setsid"), reason="this system has no process groups")


def case(sender):
    os.setsid()
    threading.Thread(target=process._end_with_reader, args=(sender.fileno(),), daemon=True).start()
    sender.send("running")
    time.sleep(600)


def test_a_case_does_not_outlive_who_waits_for_it():
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=case, args=(sender,))
    child.start()
    sender.close()
    assert receiver.recv() == "running"
    assert child.is_alive()
    receiver.close()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
