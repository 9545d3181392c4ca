"""The engine tells a request's ticket how long it was served: the steps that it was in, and not what it waited."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from flowc.runtime.protocols import GenerateRequest, Ticket

pytest.importorskip("torch")

from flowc.backends.llm.paged.backend import PagedBackend
from flowc.backends.llm.tiny import write_tiny_model


class Bill(Ticket):
    def __init__(self, priority: float) -> None:
        super().__init__(1, priority)
        self.charges: list[float] = []

    def charge(self, seconds: float) -> None:
        self.charges.append(seconds)


def test_each_step_is_charged_to_those_in_it(tmp_path: Path) -> None:
    backend = PagedBackend(str(write_tiny_model(tmp_path, hidden=32, layers=1)), threads=1, max_sequences=2)
    bills = [Bill(float(i)) for i in range(4)]
    start = time.perf_counter()
    answers = backend.generate([GenerateRequest(f"word {b.priority}", max_tokens=6, ticket=b) for b in bills])
    wall_s = time.perf_counter() - start
    backend.close()
    for bill, answer in zip(bills, answers, strict=True):
        assert not isinstance(answer, Exception)
        assert len(bill.charges) == answer.completion_tokens, (
            "a step for the prompt and its first token, one for each other"
        )
    assert sum(sum(b.charges) for b in bills) <= 2 * wall_s, "two at a time: who waits is not charged"
