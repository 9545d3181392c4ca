"""Machines for simulation: what a step, a search, an embedding take, read from the TOML files beside this one.

A profile says where its numbers come from; one whose `is_measured` is false is an estimate, and reports say so.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from flowc.ir.errors import ConfigError

__all__ = ["LLMProfile", "LaneProfile", "Machine", "load_machine", "machine_names"]

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class LLMProfile:
    """A model that batches continuously. A step of n sequences, p prompt tokens and c tokens of context takes
    `step_s + n*sequence_s + p*prompt_s + c*context_s` seconds.
    """

    step_s: float
    sequence_s: float
    prompt_s: float
    context_s: float
    max_sequences: int  # in a step
    max_step_tokens: int  # prompt tokens that a step takes on beside what it decodes
    kv_tokens: int  # of running sequences and cached prefixes together
    workers: int = 1  # replicas; sequences are spread over them evenly


@dataclass(frozen=True, slots=True)
class LaneProfile:
    """A backend that takes batches: a call of n items takes `call_s + n*item_s` seconds, `workers` calls at a time."""

    call_s: float
    item_s: float
    max_batch: int = 64
    workers: int = 1


@dataclass(frozen=True, slots=True)
class Machine:
    """All that a simulation knows of a machine."""

    name: str
    is_measured: bool
    sources: tuple[str, ...]
    llm: LLMProfile
    search: LaneProfile
    embed: LaneProfile
    rerank: LaneProfile
    tool: LaneProfile


T = TypeVar("T")


def machine_names() -> list[str]:
    """The profiles that come with flowc."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_machine(name: str | Path) -> Machine:
    """The profile of that name, or in that file. ConfigError where it is missing or malformed."""
    path = Path(name)
    if path.suffix != ".toml":
        path = FOLDER / f"{name}.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        known = ", ".join(machine_names())
        raise ConfigError(
            f"there is no machine profile {str(name)!r}", hint=f"one of {known}, or a file.toml"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from None
    kinds: dict[str, type[Any]] = {"llm": LLMProfile}
    lanes = {
        lane: _read(kinds.get(lane, LaneProfile), table.get(lane), f"[{lane}] of {path.name}")
        for lane in ("llm", "search", "embed", "rerank", "tool")
    }
    sources = table.get("sources", [])
    return Machine(path.stem, bool(table.get("measured", False)), tuple(map(str, sources)), **lanes)


def _read(kind: type[T], table: Mapping[str, Any] | None, where: str) -> T:
    if not isinstance(table, dict):
        raise ConfigError(f"{where} is missing")
    known = {f.name: f.type for f in fields(kind)}  # type: ignore[arg-type]
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"unknown key `{key}` in {where}", hint=f"its keys are {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ConfigError(f"`{key}` in {where} takes a number of at least 0, not {value!r}")
    try:
        return kind(**table)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None
