"""`Agent`: a model with a fixed system prompt and tools, called like a function.

The loop is written as an ordinary Python function below, and captured like one: it lowers to the operations that
any workflow has (template, generate, invoke, while), with a bound.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from flowc.ir.errors import LoopLimitError

from .resources import LLM
from .tools import Tool, pure, tool
from .workflow import Workflow

CALL = "TOOL:"
OBSERVATION = "OBSERVATION:"
ANSWER = "ANSWER:"


@dataclass(frozen=True, slots=True)
class Action:
    """What a reply asks for: a tool call, or (`tool` empty) the final answer in `text`."""

    tool: str
    arguments: dict[str, Any]
    text: str


@pure
def read_action(reply: str, names: tuple[str, ...]) -> Action:
    """What a reply asks for.

    That is its first line `TOOL: {"name": ..., "arguments": {...}}` that names a known tool, else the reply as the
    answer.
    """
    for line in reply.splitlines():
        stripped = line.strip()
        if not stripped.startswith(CALL):
            continue
        try:
            found = json.loads(stripped[len(CALL) :])
        except ValueError:
            continue
        if isinstance(found, dict) and found.get("name") in names and isinstance(found.get("arguments", {}), dict):
            return Action(found["name"], found.get("arguments", {}), reply)
    _, _, answer = reply.rpartition(ANSWER)
    return Action("", {}, answer.strip())


class Toolbox:
    """The tools of an agent, by name. Calling it runs one; in a workflow that is an `invoke` operation."""

    __flowc_invoke__: ClassVar[bool] = True
    __flowc_resource__: ClassVar[bool] = True

    def __init__(self, tools: Sequence[Tool[..., Any] | Callable[..., Any]]) -> None:
        declared = [t if isinstance(t, Tool) else tool(t) for t in tools]
        self.tools: dict[str, Tool[..., Any]] = {t.name: t for t in declared}
        if len(self.tools) != len(declared):
            raise ValueError("two tools of an agent have the same name")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tools)

    def __call__(self, name: str, arguments: dict[str, Any]) -> Any:
        return self.tools[name](**arguments)

    def describe(self) -> str:
        """One line a tool: its name, signature and first line of documentation."""
        return "\n".join(
            f"- {t.name}{t.signature}: {t.description.splitlines()[0] if t.description else ''}"
            for t in self.tools.values()
        )


class Agent(Workflow[[str], str]):
    """A model with a role. `agent("task")` answers it, calling tools on the way, in at most `max_turns` replies.

    Inside a workflow a call is inlined like any nested workflow. A reply that calls a tool is one line
    `TOOL: {"name": "...", "arguments": {...}}`; any other reply is the answer.
    """

    __flowc_agent__ = True

    def __init__(
        self,
        name: str,
        llm: LLM,
        *,
        system: str = "",
        tools: Sequence[Tool[..., Any] | Callable[..., Any]] = (),
        max_turns: int = 8,
        max_tokens: int = 256,
        temperature: float = 0.0,
    ) -> None:
        self.llm = llm
        self.system = system
        self.toolbox = Toolbox(tools)
        self.max_turns = max_turns
        self.has_async_tools = any(t.is_async for t in self.toolbox.tools.values())
        run = _with_tools if tools else _without_tools
        super().__init__(run(name, llm, self._preamble(), self.toolbox, max_turns, max_tokens, temperature), name=name)

    def _preamble(self) -> str:
        parts = [self.system] if self.system else []
        if self.toolbox.tools:
            parts.append(
                f"You can use these tools:\n{self.toolbox.describe()}\n"
                f'To use one, write a line {CALL} {{"name": "...", "arguments": {{...}}}} and stop. '
                f"You are then told its result after {OBSERVATION}. "
                f"When you know the answer, write {ANSWER} and the answer."
            )
        return "\n\n".join(parts)

    def __repr__(self) -> str:
        return f"<agent {self.name} on {self.llm.name}, tools: {', '.join(self.toolbox.names) or 'none'}>"


def _without_tools(
    name: str, llm: LLM, preamble: str, toolbox: Toolbox, max_turns: int, max_tokens: int, temperature: float
) -> Callable[[str], str]:
    def run(task: str) -> str:
        return llm.generate(f"{preamble}\n\nTask: {task}\n{ANSWER}", max_tokens=max_tokens, temperature=temperature)

    run.__flowc_frozen__ = True  # type: ignore[attr-defined]
    return run


def _with_tools(
    name: str, llm: LLM, preamble: str, toolbox: Toolbox, max_turns: int, max_tokens: int, temperature: float
) -> Callable[[str], str]:
    names = toolbox.names

    def run(task: str) -> str:
        transcript = f"{preamble}\n\nTask: {task}\n"
        for _ in range(max_turns):
            reply = llm.generate(transcript, max_tokens=max_tokens, temperature=temperature, stop=(OBSERVATION,))
            action = read_action(reply, names)
            if not action.tool:
                return str(action.text)
            observation = toolbox(action.tool, action.arguments)
            transcript = f"{transcript}{reply}\n{OBSERVATION} {observation}\n"
        raise LoopLimitError(
            f"agent `{name}` did not answer within {max_turns} turns",
            hint="raise max_turns, or tell the agent in `system` when to stop",
        )

    run.__flowc_frozen__ = True  # type: ignore[attr-defined]
    return run


__all__ = ["Action", "Agent", "Toolbox", "read_action"]
