"""The pool of compute tokens: never more held than there are, first come first served, none lost."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowc.runtime.compute import ComputeTokens, cores, processor


def started(work: object, count: int = 1) -> list[threading.Thread]:
    threads = [threading.Thread(target=work) for _ in range(count)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    return threads


def until(condition: object) -> None:
    end = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.001)


@settings(max_examples=20)
@given(count=st.integers(1, 4), wants=st.lists(st.integers(1, 6), min_size=1, max_size=12))
def test_no_more_are_held_than_there_are_and_none_is_lost(count: int, wants: list[int]) -> None:
    pool = ComputeTokens(count)
    lock = threading.Lock()
    held, most = 0, 0

    def work(want: int) -> None:
        nonlocal held, most
        for _ in range(5):
            with pool.hold(want):
                with lock:
                    held += min(want, count)
                    most = max(most, held)
                with lock:
                    held -= min(want, count)

    threads = [threading.Thread(target=work, args=(want,)) for want in wants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert most <= count
    assert (pool.free, held) == (count, 0)


def test_a_step_that_wants_all_cores_is_not_overtaken_by_small_ones() -> None:
    pool = ComputeTokens(2)
    order: list[str] = []

    def wide() -> None:
        with pool.hold(2):
            order.append("wide")

    def small() -> None:
        with pool.hold():
            order.append("small")

    with pool.hold():
        threads = started(wide)
        until(lambda: len(pool._waiting) == 1)
        threads += started(small)  # one token is free, but it came later
        until(lambda: len(pool._waiting) == 2)
        assert (order, pool.free) == ([], 1)
    for thread in threads:
        thread.join(10)
    assert order == ["wide", "small"]
    assert pool.free == 2


def test_a_step_that_fails_or_is_interrupted_gives_its_tokens_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ComputeTokens(1)
    with pytest.raises(ZeroDivisionError), pool.hold():
        _ = 1 / 0
    assert pool.free == 1

    class Interrupted:
        """A lock whose second `acquire`, the one that waits, is interrupted."""

        def __init__(self) -> None:
            self.calls = 0

        def acquire(self) -> bool:
            self.calls += 1
            if self.calls > 1:
                raise KeyboardInterrupt
            return True

    with pool.hold():
        with monkeypatch.context() as patch:
            patch.setattr("flowc.runtime.compute.threading.Lock", Interrupted)
            with pytest.raises(KeyboardInterrupt), pool.hold():
                pass
        assert not pool._waiting
    assert pool.free == 1


def test_the_process_has_a_token_a_core() -> None:
    assert processor.count == cores() >= 1
    with pytest.raises(ValueError, match="at least one"):
        ComputeTokens(0)
