"""OpenMP's threads go to the thread that computes next."""

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mote.inference import threads
from mote.inference.threads import release_pool

pytestmark = pytest.mark.skipif(threads._pause() is None, reason="another OpenMP keeps no pool for each thread")


def running() -> int:
    """Threads of this process, those of OpenMP included."""
    return len(os.listdir("/proc/self/task"))


def reaches(wanted: int) -> bool:
    """Whether the process has `wanted` threads within five seconds."""
    until = time.monotonic() + 5
    while running() != wanted and time.monotonic() < until:
        time.sleep(0.01)
    return running() == wanted


def compute() -> float:
    """Something that all of three threads take part in."""
    torch.set_num_threads(3)
    return float(torch.ones(1 << 20).mul_(2).sum())


def alone(work: Callable[[], None]) -> None:
    """In a new thread, in which nothing has computed yet."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    before = torch.get_num_threads()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    if failed:
        raise failed[0]


def test_pool_is_released_and_recreated() -> None:
    def work() -> None:
        assert compute() == 2 << 20
        held = running()
        release_pool()
        assert reaches(held - 2)
        release_pool()  # there is nothing to give up
        assert reaches(held - 2)
        assert compute() == 2 << 20 and reaches(held)

    alone(work)


def test_pool_of_another_thread_is_kept() -> None:
    def work() -> None:
        compute()
        held = running()
        with ThreadPoolExecutor(1) as other:
            assert other.submit(release_pool).result() is None
            assert running() == held + 1  # the other thread itself

    alone(work)


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert threads._pause.__wrapped__() is None
