"""The cost model: what operations are predicted to take, in seconds.

Passes ask it and hold no constants of their own. Two sources, later over earlier: `flowc.ir.ops.DEFAULT_RATES` and what
stands here; what `flowc calibrate` has measured on this machine, for all resources and for each by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from flowc.ir.core import Op
from flowc.ir.errors import ConfigError
from flowc.ir.ops import DEFAULT_RATES, OPS, Rates

PASS_RATES: Final[Rates] = {
    **DEFAULT_RATES,
    "turn_s": 1e-6,  # what the scheduler spends on one node
    "call_s": 1.0,  # a workflow that is called and cannot be looked into, or calls itself
    "while_trips": 3.0,
    "foreach_items": 4.0,
    "branch": 0.5,  # how likely the first region of an `if` is
    "substage_s": 50e-6,  # beta: one more turn of a search in pieces
    "settles": 0.3,  # share of a search's time that is left when its result is as good as certain
    "waste": 0.5,  # seconds that a second of unneeded work costs the others on its lane
    "chars_per_token": 4.0,
    "slot_tokens": 64.0,  # of a prompt's part that only the run knows
    "docs_tokens": 512.0,  # of search results in a prompt
    "kv_block_tokens": 16.0,  # a prompt's beginning is kept in blocks of so many
    "h2d_bytes_per_s": 0.0,  # to the device; 0: there is none
    "device_bytes": 0.0,  # what the device has free for clusters
    "index_bytes": 0.0,  # all clusters of an index
    "probe_bytes": 0.0,  # the clusters that one search probes
    "scan_bytes_per_s": 5e9,  # of clusters, by the processor
    "device_scan_bytes_per_s": 0.0,  # of clusters on the device
}
FORMAT: Final = 1  # of calibration files


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds by operation. `rates` overrides the defaults by name.

    `resources` holds rates of one resource, by `lane.name` (`llm.default`, `search.pydocs`).
    """

    rates: Mapping[str, float] = field(default_factory=dict)
    resources: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rates in (self.rates, *self.resources.values()):
            unknown = rates.keys() - PASS_RATES.keys()
            if unknown:
                raise ValueError(f"unknown rates {sorted(unknown)}; there are {sorted(PASS_RATES)}")
        object.__setattr__(self, "rates", {**PASS_RATES, **self.rates})
        object.__setattr__(self, "resources", {name: {**self.rates, **own} for name, own in self.resources.items()})

    def __getitem__(self, rate: str) -> float:
        return self.rates[rate]

    @property
    def turn_s(self) -> float:
        return self.rates["turn_s"]

    def of(self, op: Op) -> Rates:
        """The rates of the op's resource."""
        resource = op.attrs.get("resource")
        if not self.resources or not isinstance(resource, str):
            return self.rates
        return self.resources.get(f"{OPS[op.name].lane}.{resource}", self.rates)

    def own_s(self, op: Op) -> float:
        """What the op takes itself; its regions, the workflow that it calls and its turn are not counted."""
        if (op.regions and not OPS[op.name].has_resource) or op.name in ("const", "undef"):
            return 0.0
        return OPS[op.name].cost_s(op, self.of(op))


def read_calibration(path: Path) -> CostModel:
    """The cost model that `flowc calibrate` wrote. ConfigError F050 where the file is no such thing."""
    try:
        data: Any = json.loads(path.read_bytes())
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']}, not {FORMAT}")
        return CostModel(data["rates"], data["resources"])
    except OSError as error:
        raise ConfigError(f"the calibration {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no calibration: {error}", hint="`flowc calibrate` writes it anew; or delete it"
        ) from None


def write_calibration(path: Path, costs: CostModel, about: Mapping[str, Any]) -> None:
    """Writes what was measured; `about` (machine, versions, date) stands beside it for people."""
    general = {name: rate for name, rate in costs.rates.items() if rate != PASS_RATES[name]}
    own = {
        name: {key: rate for key, rate in rates.items() if rate != costs.rates[key]}
        for name, rates in costs.resources.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "about": dict(about), "rates": general, "resources": own}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
