"""The intermediate representation: types, operations, graph, text form, verifier, analyses.

Names are imported when first used, so that `import flowc` stays cheap; the text form brings lark, the view networkx.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .analyses import (
        CriticalPath,
        Dominance,
        StaticPrefix,
        branch_probabilities,
        critical_path,
        definitions,
        dependencies,
        levels,
        liveness,
        static_prefix,
        steps_to_execution,
        users,
    )
    from .builder import Block, Builder
    from .core import Attr, Attrs, Graph, Names, Op, Region, Scope, Value
    from .effects import order_edges
    from .errors import Loc
    from .ops import OPS, AttrSpec, Effect, OpSpec, effect_of
    from .parser import parse_graph
    from .printer import print_graph, print_op
    from .types import Type, parse_type
    from .values import Doc, Docs
    from .verifier import verify
    from .view import to_networkx

_WHERE = {
    "analyses": (
        "CriticalPath",
        "Dominance",
        "StaticPrefix",
        "branch_probabilities",
        "critical_path",
        "definitions",
        "dependencies",
        "dependencies",
        "levels",
        "liveness",
        "static_prefix",
        "steps_to_execution",
        "users",
    ),
    "builder": ("Block", "Builder"),
    "core": ("Attr", "Attrs", "Graph", "Names", "Op", "Region", "Scope", "Value"),
    "effects": ("order_edges",),
    "errors": ("Loc",),
    "ops": ("OPS", "AttrSpec", "Effect", "OpSpec", "effect_of"),
    "parser": ("parse_graph",),
    "printer": ("print_graph", "print_op"),
    "types": ("Type", "parse_type"),
    "values": ("Doc", "Docs"),
    "verifier": ("verify",),
    "view": ("to_networkx",),
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "OPS",
    "Attr",
    "AttrSpec",
    "Attrs",
    "Block",
    "Builder",
    "CriticalPath",
    "Doc",
    "Docs",
    "Dominance",
    "Effect",
    "Graph",
    "Loc",
    "Names",
    "Op",
    "OpSpec",
    "Region",
    "Scope",
    "StaticPrefix",
    "Type",
    "Value",
    "branch_probabilities",
    "critical_path",
    "definitions",
    "dependencies",
    "effect_of",
    "levels",
    "liveness",
    "order_edges",
    "parse_graph",
    "parse_type",
    "print_graph",
    "print_op",
    "static_prefix",
    "steps_to_execution",
    "to_networkx",
    "users",
    "verify",
]


def __getattr__(name: str) -> object:
    module = _MODULE.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
