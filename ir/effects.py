"""Effect order: which operations of a region must wait for which others, beyond the data they need.

Two operations keep program order if one writes state that the other reads or writes. A write also waits for every
operation before it that may raise, because plain Python would not have reached the write. Reads and pure operations
wait for no error: they may run ahead, and the runtime drops what Python would not have computed.

After "transform, schedule, then re-derive dependencies" (Lin et al., SuperScaler, 2023, section 3): order is derived
from the operations each time it is needed and stored nowhere, so no rewrite can leave it stale.
"""

from __future__ import annotations

from .core import Region
from .ops import Effect, effect_of


def order_edges(region: Region, effects: list[Effect] | None = None) -> list[tuple[int, ...]]:
    """For each op of the region the positions of earlier ops it waits for beyond its operands, ascending.

    Linear in ops and state names. In an ordered region each op waits for the one before it.
    """
    if region.ordered:
        return [(i - 1,) if i else () for i in range(len(region.ops))]
    edges: list[tuple[int, ...]] = []
    last_write: dict[str, int] = {}
    readers: dict[str, list[int]] = {}
    raisers: list[int] = []  # ops that may raise since the last write of anything, that write included
    for i, op in enumerate(region.ops):
        effect = effects[i] if effects is not None else effect_of(op)
        waits: set[int] = set()
        for state in effect.reads:
            if state in last_write:
                waits.add(last_write[state])
        if effect.writes:
            waits.update(raisers)
            for state in effect.writes:
                if state in last_write:
                    waits.add(last_write[state])
                waits.update(readers.pop(state, ()))
            raisers = [i]
            for state in effect.writes:
                last_write[state] = i
        elif effect.may_raise:
            raisers.append(i)
        for state in effect.reads - effect.writes:
            readers.setdefault(state, []).append(i)
        edges.append(tuple(sorted(waits)))
    return edges
