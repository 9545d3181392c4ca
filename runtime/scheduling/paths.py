"""What is left of a program in seconds of service, on its critical path and in all, read off the plan.

The plan says what follows an operation: the longest chain of lane operations to the end of its region, of the regions
around it, and of the workflows that called. How long each takes is learned where it stands: the mean service of a call
site is what its outputs' lengths come to on this machine. A loop over a list that is known by now has exactly the turns
that are left; a `while` is expected to go on as long as those before it did that came as far.

Of several operations side by side the path takes the slowest, which takes longer than their mean: what all estimates
of a plan miss alike is corrected by `bias`. What is left is judged: `error` is the sum of the misses over the sum of
what they were about.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import length_hint
from typing import Any, NamedTuple

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


class _Tails(NamedTuple):
    """Of a region: its longest path and all its service; for each instruction the longest path from before and from
    after it, its own service, and that of it and all after it in program order (one more, 0, for the end).
    """

    path_s: float
    work_s: float
    starts: list[float]
    after: list[float]
    works: list[float]
    work: list[float]


class PathModel:
    """What has been learned of one plan, whose blocks and nodes it knows by `id`: it lives no longer than the plan."""

    def __init__(self) -> None:
        self.programs = 0
        self.missed_s = self.actual_s = self.predicted_s = 0.0
        self._sites: dict[tuple[int, int], _Mean] = {}
        self._any = _Mean()  # of a site that has not run yet
        self._trips: dict[int, _Trips] = {}
        self._widths: dict[int, _Mean] = {}  # of parallel loops
        self._tails: dict[int, _Tails] = {}
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
            bias = self.bias
            self.missed_s *= RECALL
            self.actual_s *= RECALL
            self.predicted_s *= RECALL
            for had_s, predicted_s in guesses:
                actual_s = path_s - had_s
                self.missed_s += abs(bias * predicted_s - actual_s) / len(guesses)
                self.actual_s += actual_s / len(guesses)
                self.predicted_s += predicted_s / len(guesses)

    def looped(self, node: int, turns: int) -> None:
        trips = self._trips.get(node)
        if trips is None:
            trips = self._trips[node] = _Trips()
        trips.add(turns)

    @property
    def bias(self) -> float:
        """What paths were over what they were estimated to be."""
        return self.actual_s / self.predicted_s if self.predicted_s > 0.0 else 1.0

    @property
    def error(self) -> float:
        """Relative error of the estimates so far; infinite before there are any."""
        return self.missed_s / self.actual_s if self.actual_s > 0.0 else float("inf")

    @property
    def is_good(self) -> bool:
        return self.programs >= LEAST_PROGRAMS and self.error <= LARGEST_ERROR

    # -- predicting
    def remaining(self, frame: Frame, index: int, turns: dict[int, int]) -> tuple[float, float]:
        """Seconds of service from before the instruction to the program's end: on the longest path, and in all.

        `turns` takes note of how often each `while` and `foreach` around it has come round.
        """
        tails = self._of(frame.block)
        opened = frame.open
        path_s = max([tails.starts[index], *(tails.starts[i] for i in opened)])
        work_s = tails.work[frame.pc] + tails.works[index] * (index < frame.pc)
        work_s += sum(tails.works[i] for i in opened if i < frame.pc and i != index)
        at: Frame = frame
        while at.parent is not None:
            node, ret = at.node, at.ret
            if ret in (BODY, CONDITION):
                done = at.state
                if turns.get(id(node), -1) > done:  # the loop was entered anew
                    self.looped(id(node), turns[id(node)])
                turns[id(node)] = done
                cond, body = self._of(node.cond), self._of(node.body)
                left, again = self._left(node, done), ret == BODY
                path_s += left * (cond.path_s + body.path_s) + again * cond.path_s
                work_s += left * (cond.work_s + body.work_s) + again * cond.work_s
            elif ret == ITEM:
                more = length_hint(at.state[0], -1)
                if id(node) not in turns:
                    turns[id(node)] = 1 + max(more, 0)
                body, left = self._of(node.body), more if more >= 0 else self._left(node, 1)
                path_s += left * body.path_s
                work_s += left * body.work_s
            elif ret == PARALLEL_ITEM:  # its neighbours run beside it; what follows stands behind the frame of all
                at = at.parent
                items = at.state[0]
                if at.pc == 1 and isinstance(items, list):
                    self._widths.setdefault(id(node), _Mean()).add(len(items))
                waiting = len(items) - at.pc if isinstance(items, list) else 0
                work_s += (len(at.open) + waiting) * self._of(node.body).work_s
            parent = at.parent
            assert parent is not None
            tails = self._of(parent.block)
            path_s += tails.after[at.index]
            work_s += tails.work[max(parent.pc, at.index + 1)]
            at = parent
        return path_s, max(path_s, work_s)

    def _left(self, node: Any, done: int) -> float:
        trips = self._trips.get(id(node))
        left = trips.left(done) if trips is not None else DEFAULT_TRIPS
        limit = getattr(node, "limit", None)
        return left if limit is None else min(left, max(0.0, limit - done))

    def _of(self, block: Block) -> _Tails:
        found = self._tails.get(id(block))
        if found is not None:
            return found
        n = block.n
        starts, after, works, work = [0.0] * n, [0.0] * n, [0.0] * n, [0.0] * (n + 1)
        if id(block) in self._open:  # a workflow that calls itself: one turn of it is counted
            return _Tails(0.0, 0.0, starts, after, works, work)
        self._open.add(id(block))
        for i in range(n - 1, -1, -1):
            if block.ordered:
                after[i] = starts[i + 1] if i + 1 < n else 0.0
            else:
                after[i] = max((starts[s] for s in block.successors[i]), default=0.0)
            path_s, works[i] = self._own(block, i)
            starts[i] = after[i] + path_s
            work[i] = work[i + 1] + works[i]
        self._open.discard(id(block))
        found = self._tails[id(block)] = _Tails(max(starts, default=0.0), work[0], starts, after, works, work)
        return found

    def _own(self, block: Block, index: int) -> tuple[float, float]:
        """(on the path, in all) of one instruction."""
        kind, node, *_ = block.code[index]
        if kind == IF:
            then, other = self._of(node.then), self._of(node.orelse)
            return 0.5 * (then.path_s + other.path_s), 0.5 * (then.work_s + other.work_s)
        if kind == WHILE:
            cond, body, turns = self._of(node.cond), self._of(node.body), self._left(node, 0)
            path_s = cond.path_s + turns * (cond.path_s + body.path_s)
            return path_s, cond.work_s + turns * (cond.work_s + body.work_s)
        if kind == FOREACH:
            body = self._of(node.body)
            if node.is_parallel:
                width = self._widths.get(id(node))
                return body.path_s, body.work_s * (width.value if width is not None else DEFAULT_TRIPS)
            turns = self._left(node, 0)
            return turns * body.path_s, turns * body.work_s
        if kind in (TRY, CALL):
            inner = self._of(node.body if kind == TRY else node.function.block)
            return inner.path_s, inner.work_s
        site = self._sites.get((id(block), index))
        service_s = site.value if site is not None else self._any.value if kind == LANE else 0.0
        return service_s, service_s
