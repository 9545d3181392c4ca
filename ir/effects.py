"""Effect order: which operations of a region must wait for which others, beyond the data they need.

Two operations keep program order if one writes state that the other reads or writes. A write also waits for every
operation before it that may raise, because plain Python would not have reached the write. Reads and pure operations
wait for no error: they may run ahead, and the runtime drops what Python would not have computed.

Operations with the same number in the attribute `group` run at once, as those of one `asyncio.gather` do: none of
them waits for an effect of another. What stands before the group is before all of them, and what stands after waits
for all of them, as far as effects need; in an ordered region they start together once the operation before the first
of them is done, and the operation after the last waits for every one.

After "transform, schedule, then re-derive dependencies" (Lin et al., SuperScaler, 2023, section 3): order is derived
from the operations each time it is needed and stored nowhere, so no rewrite can leave it stale.
"""

from __future__ import annotations

from .core import Op, Region
from .ops import Effect, effect_of


def order_edges(region: Region, effects: list[Effect] | None = None) -> list[tuple[int, ...]]:
    """For each op of the region the positions of earlier ops it waits for beyond its operands, ascending.

    Linear in ops and state names, but for a group, whose every op what follows may wait for. In an ordered region
    each op waits for the one before it.
    """
    if region.ordered:
        return _in_program_order(region.ops)
    edges: list[tuple[int, ...]] = []
    order = _EffectOrder()
    for i, op in enumerate(region.ops):
        edges.append(order.add(i, effects[i] if effects is not None else effect_of(op), op.attrs.get("group")))
    return edges


def has_groups(region: Region) -> bool:
    """Do some of the region's operations run at once although it is ordered?"""
    return any("group" in op.attrs for op in region.ops)


def group_spans(ops: tuple[Op, ...]) -> dict[object, tuple[int, int]]:
    """For each group the positions of its first and last op."""
    spans: dict[object, tuple[int, int]] = {}
    for i, op in enumerate(ops):
        group = op.attrs.get("group")
        if group is not None:
            spans[group] = (spans[group][0] if group in spans else i, i)
    return spans


def _in_program_order(ops: tuple[Op, ...]) -> list[tuple[int, ...]]:
    spans = group_spans(ops)
    if not spans:
        return [(i - 1,) if i else () for i in range(len(ops))]
    edges: list[tuple[int, ...]] = []
    before: tuple[int, ...] = ()  # what the next op waits for
    members: list[int] = []  # of the open group
    last = -1  # position of its last op
    for i, op in enumerate(ops):
        group = op.attrs.get("group")
        if group is not None and not members:
            last = spans[group][1]
        edges.append(before)
        if group is not None:
            members.append(i)
        else:
            before = (i,)
        if members and i == last:
            before = tuple(sorted({*members, *before})) if before and before[0] > members[0] else tuple(members)
            members = []
    return edges


class _EffectOrder:
    """What has been written, read and may have raised so far."""

    __slots__ = ("group", "last_writes", "members", "raisers", "readers", "written")

    def __init__(self) -> None:
        self.last_writes: dict[str, list[int]] = {}  # one op, or those of a group
        self.readers: dict[str, list[int]] = {}
        self.raisers: list[int] = []  # ops that may raise since the last write of anything, that write included
        self.group: object = None
        self.members: list[tuple[int, Effect]] = []  # of the open group, whose effects count once it is closed
        self.written: set[str] = set()  # by them

    def add(self, i: int, effect: Effect, group: object) -> tuple[int, ...]:
        """What the next op waits for."""
        if self.members and group != self.group:
            is_other = group is not None or effect.writes or not self.written.isdisjoint(effect.reads)
            if is_other:
                self.close()
        waits: set[int] = set()
        for state in effect.reads:
            waits.update(self.last_writes.get(state, ()))
        if effect.writes:
            waits.update(self.raisers)
            for state in effect.writes:
                waits.update(self.last_writes.get(state, ()))
                waits.update(self.readers.get(state, ()))
        if group is not None:
            self.group = group
            self.members.append((i, effect))
            self.written |= effect.writes
        else:
            self.happened([(i, effect)])
        return tuple(sorted(waits))

    def close(self) -> None:
        members, self.members, self.group, self.written = self.members, [], None, set()
        self.happened(members)

    def happened(self, together: list[tuple[int, Effect]]) -> None:
        """Takes in ops that do not wait for each other."""
        writers: dict[str, list[int]] = {}
        for i, effect in together:
            for state in effect.writes:
                writers.setdefault(state, []).append(i)
        for state, by in writers.items():
            self.last_writes[state] = by
            self.readers.pop(state, None)
        if writers:  # they have waited for the raisers before them, but for those that stand among them
            first = together[0][0]
            self.raisers = [i for i in self.raisers if i > first]
        for i, effect in together:
            if effect.writes or effect.may_raise:
                self.raisers.append(i)
            for state in effect.reads - effect.writes:
                self.readers.setdefault(state, []).append(i)


__all__ = ["group_spans", "has_groups", "order_edges"]
