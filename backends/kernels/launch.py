"""What a launch is: a kernel with its grid, arguments and constants, as a value.

That it is a value lets `aot` compile for a device that is not there exactly what would run on one: the wrappers make
their launches from tensors on the "meta" device as well, which have shapes and no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import triton


def kernel(body: Callable[..., Any]) -> Any:
    """The Triton kernel with this body; or its interpreted form, where TRITON_INTERPRET=1 was set before the import."""
    return triton.jit(body)


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of `kernel` over `grid` programs.

    `arguments` are tensors, integers and floats by parameter name, `constants` the parameters that are compiled in.
    `stages` is the depth of the software pipeline of loads.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    warps: int
    stages: int

    def run(self) -> None:
        """Puts the launch on the current stream. An empty grid is no launch."""
        if 0 not in self.grid:
            self.kernel[self.grid](**self.arguments, **self.constants, num_warps=self.warps, num_stages=self.stages)


def power_of_two(least: int) -> int:
    """The smallest power of two that is not below `least`: tile sides have to be one."""
    return 1 << max(0, least - 1).bit_length()
