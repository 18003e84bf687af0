"""Counts that arrive when they arrive."""

from __future__ import annotations

import threading

import torch

from sparseflow.dispatch import mailbox
from sparseflow.dispatch.mailbox import Mailbox

from .fake import no_waiting


class Arrival:
    """Stands in for the event behind a copy."""

    def __init__(self):
        self.done = False

    def query(self):
        return self.done


def test_a_letter_is_delivered_after_it_arrived_and_once(monkeypatch):
    arrivals, seen, box = [Arrival(), Arrival()], [], Mailbox()
    waiting = iter(arrivals)
    monkeypatch.setattr(mailbox, "_event", lambda pair: next(waiting))
    for number in (1, 2):
        box.send(torch.tensor([number, 10 * number]), lambda *pair: seen.append(pair))
    box.poll()
    assert seen == []
    arrivals[1].done = True
    box.poll()
    assert seen == [(2, 20)]
    arrivals[0].done = True
    box.poll()
    box.poll()
    assert seen == [(2, 20), (1, 10)]


def test_letters_are_dropped_while_all_slots_are_on_their_way(monkeypatch):
    arrivals, seen, box = [], [], Mailbox()
    monkeypatch.setattr(mailbox, "_event", lambda pair: arrivals.append(Arrival()) or arrivals[-1])
    for number in range(50):
        box.send(torch.tensor([number, 0]), lambda first, _: seen.append(first))
    assert len(arrivals) == mailbox._SLOTS
    for arrival in arrivals:
        arrival.done = True
    box.poll()
    assert seen == list(range(mailbox._SLOTS))
    box.send(torch.tensor([99, 0]), lambda first, _: seen.append(first))
    arrivals[-1].done = True
    box.poll()
    assert seen[-1] == 99


def test_large_counts_and_no_waiting():
    seen, box = [], Mailbox()
    with no_waiting():
        box.send(torch.tensor([2**40, -1]), lambda *pair: seen.append(pair))
        box.poll()
    assert seen == [(2**40, -1)]


def test_many_threads_lose_nothing_that_was_sent():
    box, seen = Mailbox(), []

    def work():
        for _ in range(100):
            box.send(torch.tensor([1, 1]), lambda first, _: seen.append(first))
            box.poll()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    box.poll()
    assert len(seen) == 400
    assert sorted(box._free) == list(range(mailbox._SLOTS))
