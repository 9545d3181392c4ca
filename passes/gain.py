"""What a rewrite was measured to save, beside what it was predicted to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gain:
    """What a pass was measured to save per run, in seconds (None: not yet known again since it was switched off), with
    the standard error, from so many runs that differed in it alone; and whether it is still on."""

    seconds: float | None
    error: float
    runs: int
    is_on: bool

    def __str__(self) -> str:
        """`measured: saves 12 ms a run (+- 2 ms, 24 runs without it)`."""
        if self.seconds is None:
            return "switched off: it lost when it was measured"
        word = "saves" if self.seconds >= 0 else "costs"
        shown = f"{word} {show_s(abs(self.seconds))} a run (+- {show_s(self.error)}, {self.runs} runs"
        return f"measured: {shown} without it)" if self.is_on else f"switched off; measured: {shown} with it)"


def show_s(seconds: float) -> str:
    """Seconds for people: `1.24 s`, `35 ms`, `2 us`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return "0 s" if seconds == 0 else f"{seconds / 1e-9:.3g} ns"
