"""The cost model: what operations are predicted to take, in seconds.

Passes ask it and hold no constants of their own. The rates are `flowc.ir.ops.DEFAULT_RATES` until `flowc calibrate` has
measured the machine; then the measured ones replace them by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from flowc.ir.core import Op
from flowc.ir.ops import DEFAULT_RATES, OPS, Rates

PASS_RATES: Final[Rates] = {
    **DEFAULT_RATES,
    "turn_s": 1e-6,  # what the scheduler spends on one node
    "call_s": 1.0,  # a workflow that is called and cannot be looked into, or calls itself
    "while_trips": 3.0,
    "foreach_items": 4.0,
    "branch": 0.5,  # how likely the first region of an `if` is
}


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds by operation. `rates` overrides the defaults by name."""

    rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = self.rates.keys() - PASS_RATES.keys()
        if unknown:
            raise ValueError(f"unknown rates {sorted(unknown)}; there are {sorted(PASS_RATES)}")
        object.__setattr__(self, "rates", {**PASS_RATES, **self.rates})

    def __getitem__(self, rate: str) -> float:
        return self.rates[rate]

    @property
    def turn_s(self) -> float:
        return self.rates["turn_s"]

    def own_s(self, op: Op) -> float:
        """What the op takes itself; its regions, the workflow that it calls and its turn are not counted."""
        if op.regions or op.name in ("const", "undef"):
            return 0.0
        return OPS[op.name].cost_s(op, self.rates)
