"""A condition is free after an interrupt in every moment of a `with` block."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults.interrupts import interrupted
from torchwrap.storage.condition import Condition


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """An interrupt is raised here, although a shell starts what runs in the background with it ignored."""
    before, interval = signal.signal(signal.SIGINT, signal.default_int_handler), sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval)
    signal.signal(signal.SIGINT, before)


def is_free(condition: threading.Condition) -> bool:
    """Whether another thread gets it."""
    got: list[bool] = []

    def take() -> None:
        got.append(condition.acquire(timeout=1))
        if got[0]:
            condition.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return got[0]


class _Quietly(int):
    """Reading `interrupt` notes an interrupt, and Python does not look for one there."""

    interrupt = property(_thread.interrupt_main)


@pytest.mark.parametrize("make", [Condition, lambda: Condition(threading.RLock())], ids=["default", "reentrant"])
def test_an_interrupt_before_the_end_of_the_block(make: type[Condition]) -> None:
    condition, noted = make(), _Quietly(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), condition:
        noted.interrupt  # noqa: B018
    assert is_free(condition)


def test_an_interrupt_while_the_lock_is_had_and_the_interpreter_is_not() -> None:
    condition, held = Condition(), threading.Event()

    def hold() -> None:
        with condition:
            held.set()
            time.sleep(0.1)  # the main thread waits for the lock
            sys.setswitchinterval(100)
        end = time.monotonic() + 0.1
        while time.monotonic() < end:  # it has it now, and waits for the interpreter
            pass
        _thread.interrupt_main()

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    with pytest.raises(KeyboardInterrupt), condition:
        for _ in range(1000):
            time.sleep(0)
    thread.join()
    assert is_free(condition)


def test_an_interrupt_at_any_moment_of_waiting() -> None:
    condition = Condition()

    def wait() -> None:
        with condition, condition:
            condition.wait(0.001)

    number = 0
    while interrupted(wait, "storage/condition.py", "wait", number):
        assert is_free(condition)
        number += 1
    assert number > 5
    with condition:
        condition.notify_all()
    assert not condition._waiters  # type: ignore[attr-defined]


@pytest.mark.parametrize(("timeout", "seconds"), [(-1.0, 0.0), (0.0, 0.0), (0.05, 0.05)])
def test_waiting_ends_when_the_time_is_over(timeout: float, seconds: float) -> None:
    condition, began = Condition(), time.monotonic()
    with condition:
        assert not condition.wait(timeout)
    assert time.monotonic() - began >= seconds
    with pytest.raises(RuntimeError, match="un-acquired"):
        condition.wait(0)


def test_it_is_reentrant_and_waits_like_its_base() -> None:
    condition, seen = Condition(), []

    def tell() -> None:
        with condition, condition:
            seen.append(1)
            condition.notify_all()

    thread = threading.Thread(target=tell)
    with condition:
        thread.start()
        assert condition.wait_for(lambda: bool(seen), timeout=10)
    thread.join()
    assert is_free(condition)
