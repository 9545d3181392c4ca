"""Predictions: made at once or on a thread, made anew as words come, taken back, and never in anybody's way."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

from flowc.backends.vector.device.devices import I64
from flowc.backends.vector.device.lookahead import AHEAD, CHANCES, WORDS, Lookahead, chances
from flowc.runtime.protocols import ClusterCache
from tests.backends.vector.device.rig import Rig, scattered


class Plans:
    """Lists that name how many words a text has: n words are the lists from n on."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.error: Exception | None = None

    def __call__(self, texts: Sequence[str]) -> list[tuple[I64, int] | None]:
        self.asked += texts
        if self.error is not None:
            raise self.error
        out: list[tuple[I64, int] | None] = []
        for text in texts:
            first = len(text.split()) % 16
            out.append(None if text == "bad" else ((first + np.arange(4)) % 16, 1))
        return out


@pytest.fixture
def rig() -> Rig:
    return Rig(scattered(800, 1), 16, share=2.0)


def test_it_is_what_the_compiler_drives(rig: Rig) -> None:
    assert isinstance(Lookahead(rig.cache, Plans(), threads=False), ClusterCache)


def test_it_predicts_again_after_five_ten_and_twenty_whole_words(rig: Rig) -> None:
    plans = Plans()
    ahead = Lookahead(rig.cache, plans, threads=False)
    ahead.predict("a", "what is it", 1.0)
    text = ""
    for n in range(1, 25):
        text += f" w{n}"
        ahead.follow("a", text)
        ahead.follow("a", text)  # as often as one likes
    words = [len(asked.split()) - 3 for asked in plans.asked]
    assert words == [0, 6, 11, 21]  # a word is whole when the next one begins
    assert plans.asked[1] == "what is it  w1 w2 w3 w4 w5 w6"
    ahead.follow("b", text)  # was not announced
    assert len(plans.asked) == 4


def test_the_newest_prediction_is_the_one_that_counts(rig: Rig) -> None:
    ahead = Lookahead(rig.cache, Plans(), threads=False)
    ahead.predict("a", "one", 1.0)
    rig.elapse(0.1)
    assert set(rig.cache.resident().tolist()) == {1, 2, 3, 4}
    ahead.follow("a", "two three four five six seven ")
    rig.elapse(0.1)
    assert rig.cache._predictions["a"].lists.tolist() == [7, 8, 9, 10]
    assert set(rig.cache.resident().tolist()) >= {7, 8, 9, 10}
    ahead.release("a")
    assert not rig.cache._predictions
    assert ahead.stats().predictions == 2


def test_a_window_that_was_too_short_is_made_longer_while_words_come(rig: Rig) -> None:
    ahead = Lookahead(rig.cache, Plans(), threads=False)
    ahead.predict("a", "one", 0.01)
    rig.clock.sleep(1.0)
    ahead.follow("a", "two three four five six seven ")
    assert rig.cache._predictions["a"].due_s == pytest.approx(1.5)
    assert ahead.stats().late == 0


def test_nothing_that_goes_wrong_comes_out(rig: Rig) -> None:
    plans = Plans()
    ahead = Lookahead(rig.cache, plans, threads=False)
    ahead.predict("a", "bad", 1.0)
    assert ahead.stats().errors == 1
    plans.error = RuntimeError("no embedder")
    ahead.predict("a", "one", 1.0)
    ahead.follow("a", "two three four five six seven ")
    ahead.predict("a", "one", float("nan"))
    ahead.predict("a", "one", "soon")  # type: ignore[arg-type]
    ahead.follow("a", None)  # type: ignore[arg-type]
    ahead.predict([], "one", 1.0)  # type: ignore[arg-type]
    ahead.release([])  # type: ignore[arg-type]
    assert ahead.stats().errors >= 6
    assert not rig.cache._predictions


def test_announcements_nobody_takes_back_fall_out(rig: Rig) -> None:
    ahead = Lookahead(rig.cache, Plans(), threads=False)
    for n in range(50):
        ahead.predict(n, "one", 0.1)
        rig.clock.sleep(1.0)
    assert 25 < len(ahead._announced) < 35
    assert set(rig.cache._predictions) == set(ahead._announced)


def test_callers_do_not_wait_for_the_embedder(rig: Rig) -> None:
    gate = threading.Event()
    plans = Plans()

    def slow(texts: Sequence[str]) -> list[tuple[I64, int] | None]:
        gate.wait(10)
        return plans(texts)

    ahead = Lookahead(rig.cache, slow)
    began = time.monotonic()
    for n in range(100):
        ahead.predict(n % 5, f"text {'word ' * n}", 100.0)
        ahead.follow(n % 5, "two three four five six seven ")
    assert time.monotonic() - began < 5
    gate.set()
    end = time.monotonic() + 10
    while len(rig.cache._predictions) < 5 and time.monotonic() < end:
        time.sleep(0.001)
    assert len(rig.cache._predictions) == 5
    assert len(plans.asked) <= 12  # the newest of each key, and what was taken before
    ahead.close()
    assert not rig.cache._predictions


def test_probabilities_fall_with_rank_and_lean_on_what_is_known() -> None:
    for words in (0, *WORDS):
        row = chances(AHEAD * 8, 8, words)
        assert len(row) == 32
        assert (np.diff(row) <= 0).all()
        assert 0 < row[-1] < row[0] < 1
    assert chances(8, 8, 20)[0] > chances(8, 8, 0)[0]
    assert {len(row) for row in CHANCES} == {5}
