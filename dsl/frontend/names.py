"""What the names of a function mean outside it, and the guards under which that stays true.

A resolved name (a resource, a tool, a workflow, a constant of the module) becomes part of the captured graph, so the
capture holds only while the name still means the same object: that is a guard, checked at every call of the workflow.
"""

from __future__ import annotations

import ast
import builtins
import dis
import types
from collections.abc import Mapping
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple

from flowc.ir.types import ANY, is_immutable, type_of


class Missing:
    """The type of `MISSING`: no static meaning."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING = Missing()


class Guard(NamedTuple):
    """`holder[name]` (or the cell's content) must still be `value`."""

    holder: Mapping[str, Any] | CellType
    name: str
    value: Any

    def holds(self) -> bool:
        if isinstance(self.holder, CellType):
            try:
                return self.holder.cell_contents is self.value
            except ValueError:
                return False
        return self.holder.get(self.name, MISSING) is self.value


class Resolver:
    """Static meaning of the free names of one function."""

    def __init__(self, fn: FunctionType, locals_: frozenset[str], declared_global: frozenset[str]) -> None:
        self.globals = fn.__globals__
        self.cells: dict[str, CellType] = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
        self.is_frozen = getattr(fn, "__flowc_frozen__", False)  # its closure variables never change
        self.locals = locals_
        self.declared_global = declared_global
        self.guards: dict[tuple[int, str], Guard] = {}

    def lookup(self, name: str) -> Any:
        """The object that a free name means now, with a guard on it; MISSING for a local or unbound one."""
        if name in self.locals:
            return MISSING
        cell = self.cells.get(name)
        if cell is not None:
            try:
                value = cell.cell_contents
            except ValueError:
                return MISSING
            self._guard(cell, name, value)
            return value
        if name in self.globals:
            value = self.globals[name]
            self._guard(self.globals, name, value)
            return value
        return getattr(builtins, name, MISSING)

    def resolve(self, node: ast.expr) -> Any:
        """The object that `name` or `name.attr.attr` means, where that can be known without running user code."""
        if isinstance(node, ast.Name):
            return self.lookup(node.id)
        if isinstance(node, ast.Attribute):
            base = self.resolve(node.value)
            if base is MISSING:
                return MISSING
            return self._member(base, node.attr)
        return MISSING

    def _member(self, base: Any, attr: str) -> Any:
        if isinstance(base, types.ModuleType):
            value = base.__dict__.get(attr, MISSING)
            if value is not MISSING:
                self._guard(base.__dict__, attr, value)
            return value
        own = getattr(base, "__dict__", None)
        if isinstance(own, dict) and attr in own and not _has_own_getattribute(base):
            self._guard(own, attr, own[attr])
            return own[attr]
        if getattr(type(base), "__flowc_resource__", False):
            return getattr(base, attr, MISSING)
        return MISSING

    def constant(self, node: ast.expr) -> Any:
        """The value of an immutable module constant that nothing in the module rebinds; MISSING for all else."""
        if not isinstance(node, (ast.Name, ast.Attribute)):
            return MISSING
        if isinstance(node, ast.Name) and (
            (node.id in self.cells and not self.is_frozen) or node.id in self.declared_global
        ):
            return MISSING
        value = self.resolve(node)
        if value is MISSING or type_of(value) == ANY or not is_immutable(type_of(value)):
            return MISSING
        name = node.id if isinstance(node, ast.Name) else node.attr
        holder = self.globals if isinstance(node, ast.Name) and node.id not in self.cells else None
        if isinstance(node, ast.Attribute):
            base = self.resolve(node.value)
            if not isinstance(base, types.ModuleType):
                return MISSING
            holder = base.__dict__
        if holder is not None and name in _rebound(holder):
            return MISSING
        return value

    def _guard(self, holder: Mapping[str, Any] | CellType, name: str, value: Any) -> None:
        self.guards[id(holder), name] = Guard(holder, name, value)


def _has_own_getattribute(value: Any) -> bool:
    return any("__getattribute__" in vars(cls) for cls in type(value).__mro__[:-1])


_REBOUND: dict[int, tuple[int, frozenset[str]]] = {}


def _rebound(namespace: Mapping[str, Any]) -> frozenset[str]:
    """Globals of a module that some function of the module assigns (`global NAME`)."""
    known = _REBOUND.get(id(namespace))
    if known is not None and known[0] == len(namespace):
        return known[1]
    found: set[str] = set()
    for value in list(namespace.values()):
        pending: list[CodeType] = []
        for candidate in (value, *(vars(value).values() if isinstance(value, type) else ())):
            fn = getattr(candidate, "__wrapped__", None) or getattr(candidate, "fn", None) or candidate
            if isinstance(fn, FunctionType) and fn.__globals__ is namespace:
                pending.append(fn.__code__)
        while pending:
            code = pending.pop()
            pending += [c for c in code.co_consts if isinstance(c, CodeType)]
            if code.co_names:
                found.update(
                    i.argval for i in dis.get_instructions(code) if i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")
                )
    _REBOUND[id(namespace)] = (len(namespace), frozenset(found))
    return frozenset(found)
