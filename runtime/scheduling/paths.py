"""What is left of a program: its remaining critical path in seconds of service, read off the plan.

The plan says what follows an operation: the longest chain of lane operations to the end of its region, of the regions
around it, and of the workflows that called. How long each takes is learned where it stands: the mean service of a call
site is what its outputs' lengths come to on this machine. A loop over a list that is known by now has exactly the turns
that are left; a `while` is expected to go on as long as those before it did that came as far.

The estimate is judged by how it did: `error` is the sum of its misses over the sum of what they were about.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import length_hint
from typing import Any

from ..plan import CALL, FOREACH, IF, LANE, TRY, WHILE, Block
from ..program import BODY, CONDITION, ITEM, PARALLEL_ITEM, Frame

LEAST_PROGRAMS = 8  # that have ended before an estimate is worth anything
LARGEST_ERROR = 0.5  # beyond it a plan's estimates are not used: of a coin-tossing loop's length it is about 0.7
MAX_TRIPS = 128  # up to which the lengths of loops are told apart
DEFAULT_TRIPS = 3.0
RECALL = 0.98  # weight of the past against one more program


class _Mean:
    """A mean that forgets slowly: the plain mean of the first fifty, then exponential."""

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.count = 0
        self.value = 0.0

    def add(self, x: float) -> None:
        self.count += 1
        self.value += (x - self.value) / min(self.count, 50)


class _Trips:
    """How many turns a loop took, as a histogram."""

    __slots__ = ("counts", "most")

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.most = 0

    def add(self, turns: int) -> None:
        at = min(turns, MAX_TRIPS)
        if at >= len(self.counts):
            self.counts.extend([0] * (at + 1 - len(self.counts)))
        self.counts[at] += 1

    def left(self, done: int) -> float:
        """Expected further turns of a loop that has begun `done`; as many as it has had where none came so far."""
        n = total = 0
        for turns in range(done, len(self.counts)):
            n += self.counts[turns]
            total += self.counts[turns] * (turns - done)
        if n:
            return total / n
        return float(max(done, 1)) if self.counts else DEFAULT_TRIPS


class PathModel:
    """What has been learned of one plan, whose blocks and nodes it knows by `id`: it lives no longer than the plan."""

    def __init__(self) -> None:
        self.programs = 0
        self.missed_s = self.actual_s = 0.0
        self._sites: dict[tuple[int, int], _Mean] = {}
        self._any = _Mean()  # of a site that has not run yet
        self._trips: dict[int, _Trips] = {}
        self._tails: dict[int, tuple[float, list[float], list[float]]] = {}
        self._open: set[int] = set()
        self._observed = 0
        self._due = 1

    # -- learning
    def observe(self, block: Block, index: int, service_s: float) -> None:
        """A call site was served so long."""
        site = self._sites.get((id(block), index))
        if site is None:
            site = self._sites[id(block), index] = _Mean()
        site.add(service_s)
        self._any.add(service_s)
        self._observed += 1
        if self._observed >= self._due:  # a quarter more is known than when the tails were worked out
            self._due = self._observed + max(1, self._observed // 4 if self._observed < 4096 else 1024)
            self._tails.clear()

    def ended(self, turns: dict[int, int], guesses: Sequence[tuple[float, float]], path_s: float) -> None:
        """A program ended with a path of so much service; `guesses` are (path had by then, what was predicted)."""
        self.programs += 1
        for node, count in turns.items():
            self.looped(node, count)
        if guesses:
            self.missed_s *= RECALL
            self.actual_s *= RECALL
            for had_s, predicted_s in guesses:
                actual_s = path_s - had_s
                self.missed_s += abs(predicted_s - actual_s) / len(guesses)
                self.actual_s += actual_s / len(guesses)

    def looped(self, node: int, turns: int) -> None:
        trips = self._trips.get(node)
        if trips is None:
            trips = self._trips[node] = _Trips()
        trips.add(turns)

    @property
    def error(self) -> float:
        """Relative error of the estimates so far; infinite before there are any."""
        return self.missed_s / self.actual_s if self.actual_s > 0.0 else float("inf")

    @property
    def is_good(self) -> bool:
        return self.programs >= LEAST_PROGRAMS and self.error <= LARGEST_ERROR

    # -- predicting
    def remaining_s(self, frame: Frame, index: int, turns: dict[int, int]) -> float:
        """Seconds of service on the longest path from before the instruction to the program's end.

        `turns` takes note of how often each `while` and `foreach` around it has come round.
        """
        if len(self._tails) > 4096:
            self._tails.clear()
        _, starts, _ = self._of(frame.block)
        left_s = starts[index]
        for other in frame.open:
            if starts[other] > left_s:
                left_s = starts[other]
        at: Frame = frame
        while at.parent is not None:
            node, ret = at.node, at.ret
            if ret in (BODY, CONDITION):
                done = at.state
                if turns.get(id(node), -1) > done:  # the loop was entered anew
                    self.looped(id(node), turns[id(node)])
                turns[id(node)] = done
                around_s = self._of(node.cond)[0] + self._of(node.body)[0]
                left_s += self._left(node, done) * around_s
                left_s += self._of(node.cond)[0] if ret == BODY else 0.0
            elif ret == ITEM:
                more = length_hint(at.state[0], -1)
                if id(node) not in turns:
                    turns[id(node)] = 1 + max(more, 0)
                left_s += (more if more >= 0 else self._left(node, 1)) * self._of(node.body)[0]
            elif ret == PARALLEL_ITEM:  # its neighbours run beside it; what follows stands behind the frame of all
                at = at.parent
            parent = at.parent
            assert parent is not None
            left_s += self._of(parent.block)[2][at.index]
            at = parent
        return left_s

    def _left(self, node: Any, done: int) -> float:
        trips = self._trips.get(id(node))
        left = trips.left(done) if trips is not None else DEFAULT_TRIPS
        limit = getattr(node, "limit", None)
        return left if limit is None else min(left, max(0.0, limit - done))

    def _of(self, block: Block) -> tuple[float, list[float], list[float]]:
        """(seconds of the region, from before each instruction to its end, from after each instruction to its end)"""
        found = self._tails.get(id(block))
        if found is not None:
            return found
        if id(block) in self._open:  # a workflow that calls itself: one turn of it is counted
            return 0.0, [0.0] * block.n, [0.0] * block.n
        self._open.add(id(block))
        n = block.n
        starts, after = [0.0] * n, [0.0] * n
        for i in range(n - 1, -1, -1):
            if block.ordered:
                after[i] = starts[i + 1] if i + 1 < n else 0.0
            else:
                after[i] = max((starts[s] for s in block.successors[i]), default=0.0)
            starts[i] = after[i] + self._own(block, i)
        self._open.discard(id(block))
        found = self._tails[id(block)] = (max(starts, default=0.0), starts, after)
        return found

    def _own(self, block: Block, index: int) -> float:
        kind, node, *_ = block.code[index]
        if kind == LANE:
            site = self._sites.get((id(block), index))
            return site.value if site is not None else self._any.value
        if kind == IF:
            return 0.5 * (self._of(node.then)[0] + self._of(node.orelse)[0])
        if kind == WHILE:
            cond_s = self._of(node.cond)[0]
            return cond_s + self._left(node, 0) * (cond_s + self._of(node.body)[0])
        if kind == FOREACH:
            return (1.0 if node.is_parallel else self._left(node, 0)) * self._of(node.body)[0]
        if kind == TRY:
            return self._of(node.body)[0]
        if kind == CALL:
            return self._of(node.function.block)[0]
        return 0.0
