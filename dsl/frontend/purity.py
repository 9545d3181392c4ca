"""What a piece of plain Python does: its type, whether it reads or writes shared state, whether it can raise.

The purity rule (design section 3): literals, operators, f-strings, methods of str, list and retrieved documents on
local values, a known list of builtins and standard-library functions, and functions marked `@pure` have no side
effects; operators and formatting of unknown objects are assumed to have none, but may read state that opaque Python
changes. Any other call is opaque: it may change everything.

A fresh list has an *allocation site*. While no alias of it escapes to opaque code it is a value (type `list<T>`); sites
that
turn out to escape are collected in `escaped`, and the caller analyses again with those sites `tainted` (type `any`).
"""

from __future__ import annotations

import ast
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from flowc.ir.types import (
    ANY,
    BOOL,
    BYTES,
    DOC,
    DOCS,
    FLOAT,
    INT,
    NEVER,
    NONE,
    RANGE,
    TEXT,
    Type,
    is_immutable,
    is_scalar,
    item_type,
    join,
    list_of,
    sequence_of,
    tuple_of,
    type_of,
)

from ..signatures import annotation_type
from .liveness import reads_in_order
from .names import MISSING, Resolver

Site = tuple[int, int]
PURE, READS, WRITES = 0, 1, 2
NUMBERS = (BOOL, INT, FLOAT)


@dataclass(frozen=True, slots=True)
class Info:
    """Facts about an expression. `level` is PURE, READS or WRITES; `sites` are the lists it may be or hold."""

    type: Type = ANY
    level: int = PURE
    raises: bool = False
    sites: frozenset[Site] = frozenset()
    is_async: bool = False

    @property
    def touch(self) -> int:
        """The level of looking inside the value."""
        return PURE if is_immutable(self.type) else READS


UNKNOWN = Info(ANY, PURE, False)


def may_hold_lists(t: Type) -> bool:
    """May a value of this type be, or hold, a list that some variable names too?"""
    return t == ANY or t.name in ("list", "sequence") or any(map(may_hold_lists, t.args))


Lookup = Callable[[str], Info | None]

TEXT_METHODS: dict[str, tuple[Type, bool]] = {
    name: (t, raises)
    for t, raises, names in (
        (
            TEXT,
            False,
            "strip lstrip rstrip lower upper title casefold capitalize swapcase expandtabs removeprefix removesuffix",
        ),
        (TEXT, True, "replace center ljust rjust zfill join translate format"),
        (BOOL, True, "startswith endswith"),
        (
            BOOL,
            False,
            "isdigit isalpha isalnum isspace isupper islower isnumeric isdecimal isidentifier istitle isascii "
            "isprintable",
        ),
        (INT, True, "index rindex"),
        (INT, True, "find rfind count"),
        (list_of(TEXT), False, "splitlines"),
        (list_of(TEXT), True, "split rsplit"),
        (tuple_of(TEXT, TEXT, TEXT), True, "partition rpartition"),
        (BYTES, True, "encode"),
    )
    for name in names.split()
}
LIST_METHODS = {"count": INT, "index": INT, "copy": None}
DOC_FIELDS = {"text": TEXT, "title": TEXT, "source": TEXT, "score": FLOAT, "id": INT}
DOCS_FIELDS = {"texts": sequence_of(TEXT), "sources": sequence_of(TEXT), "ids": sequence_of(INT)}

_MODULES = {
    "math": None,  # every function
    "json": {"dumps", "loads"},
    "re": {"match", "search", "fullmatch", "findall", "split", "sub", "escape", "compile"},
    "textwrap": None,
    "string": None,
    "os.path": {"join", "basename", "dirname", "splitext", "normpath"},
    "posixpath": {"join", "basename", "dirname", "splitext", "normpath"},
    "statistics": None,
    "html": {"escape", "unescape"},
    "operator": {"itemgetter", "attrgetter", "add", "mul", "sub", "eq", "lt", "gt"},
    "difflib": {"get_close_matches"},
}
_CONSUMERS = frozenset(
    {
        "sum",
        "any",
        "all",
        "max",
        "min",
        "sorted",
        "list",
        "tuple",
        "set",
        "frozenset",
        "dict",
        "join",
        "map",
        "filter",
        "reversed",
    }
)


class Analyzer:
    """Analyses expressions and op-free statements over the local types that `lookup` knows."""

    def __init__(self, resolver: Resolver, lookup: Lookup, tainted: frozenset[Site] = frozenset()) -> None:
        self.resolver = resolver
        self.lookup = lookup
        self.tainted = tainted
        self.escaped: set[Site] = set()
        self.captures: list[
            tuple[ast.AST, str]
        ] = []  # (lambda or nested def, local it holds on to) past this statement
        self.trusts = False  # does a type found here rest on an annotation that nobody checks?
        self._scopes: list[dict[str, Info]] = []
        self._immediate = False

    # -- entry points
    def expr(self, node: ast.expr) -> Info:
        method = getattr(self, "_" + type(node).__name__, None)
        if method is None:
            return self._generic(node)
        found: Info = method(node)
        return found

    def stmts(self, body: Sequence[ast.stmt], env: dict[str, Info]) -> Info:
        """The combined effect of statements without operations; `env` receives what they bind."""
        total = Info(NONE)
        with self.scope(env):
            for s in body:
                total = self._both(total, self._stmt(s))
        return total

    # -- helpers
    @contextmanager
    def scope(self, names: dict[str, Info]) -> Iterator[None]:
        """Inside, these names mean variables of their own."""
        self._scopes.append(names)
        try:
            yield
        finally:
            self._scopes.pop()

    @staticmethod
    def _both(a: Info, b: Info) -> Info:
        return Info(b.type, max(a.level, b.level), a.raises or b.raises, b.sites, a.is_async or b.is_async)

    def _all(self, nodes: Sequence[ast.expr | None]) -> tuple[list[Info], Info]:
        infos = [self.expr(n) for n in nodes if n is not None]
        total = Info(NONE)
        for i in infos:
            total = self._both(total, i)
        return infos, replace(total, sites=frozenset().union(*(i.sites for i in infos)))

    def _fresh(self, node: ast.AST, item: Type, inner: frozenset[Site] = frozenset()) -> tuple[Type, frozenset[Site]]:
        site = (getattr(node, "lineno", 0), getattr(node, "col_offset", 0))
        if site in self.tainted:
            self.escaped |= inner
            return ANY, frozenset()
        return list_of(item), inner | {site}

    def fresh(self, node: ast.AST, item: Type, inner: frozenset[Site] = frozenset()) -> tuple[Type, frozenset[Site]]:
        """Type and sites of a list that `node` makes."""
        return self._fresh(node, item, inner)

    def _opaque(self, node: ast.AST, parts: Info, result: Type = ANY) -> Info:
        self.escaped |= parts.sites
        return Info(result, WRITES, True, frozenset(), parts.is_async)

    # -- leaves
    def _Constant(self, node: ast.Constant) -> Info:
        return Info(type_of(node.value))

    def _Name(self, node: ast.Name) -> Info:
        for scope in reversed(self._scopes):
            if node.id in scope:
                return scope[node.id]
        local = self.lookup(node.id)
        if local is not None:
            return replace(local, level=PURE, raises=False)
        value = self.resolver.constant(node)
        if value is not MISSING:
            return Info(type_of(value))
        value = self.resolver.lookup(node.id)
        if value is MISSING:
            return Info(ANY, READS, True)
        if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type, types.ModuleType)) or _is_resource(
            value
        ):
            return Info(ANY)
        return Info(ANY, READS, False)

    def _JoinedStr(self, node: ast.JoinedStr) -> Info:
        level, raises, is_async = PURE, False, False
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                i = self.expr(part.value)
                level = max(level, i.level, i.touch)
                raises |= i.raises or part.format_spec is not None or not is_immutable(i.type)
                is_async |= i.is_async
                if part.format_spec is not None:
                    level = max(level, self.expr(part.format_spec).level)
        return Info(TEXT, level, raises, frozenset(), is_async)

    # -- displays and comprehensions
    def _List(self, node: ast.List) -> Info:
        infos, total = self._all(node.elts)
        items = [
            item_type(i.type) if isinstance(e, ast.Starred) else i.type for e, i in zip(node.elts, infos, strict=True)
        ]
        starred = any(isinstance(e, ast.Starred) for e in node.elts)
        t, sites = self._fresh(node, join(*items) if items else NEVER, total.sites)
        return replace(total, type=t, sites=sites, raises=total.raises or starred)

    def _Tuple(self, node: ast.Tuple) -> Info:
        infos, total = self._all(node.elts)
        if any(isinstance(e, ast.Starred) for e in node.elts):
            return replace(total, type=ANY, raises=True)
        return replace(total, type=tuple_of(*(i.type for i in infos)))

    def _Set(self, node: ast.Set) -> Info:
        infos, total = self._all(node.elts)
        self.escaped |= total.sites
        level = max([total.level, *(i.touch for i in infos)])  # hashing looks inside
        return replace(total, level=level, type=ANY, raises=True, sites=frozenset())

    def _Dict(self, node: ast.Dict) -> Info:
        infos, total = self._all([*node.keys, *node.values])
        self.escaped |= total.sites
        level = max([total.level, *(i.touch for i in infos)])  # hashing and `**` look inside
        return replace(total, level=level, type=ANY, raises=True, sites=frozenset())

    def _comprehension(
        self, node: ast.expr, generators: list[ast.comprehension], elements: list[ast.expr]
    ) -> tuple[list[Info], Info]:
        total = Info(NONE)
        depth = 0
        try:
            for g in generators:
                source = self.expr(g.iter)
                total = self._both(total, source)
                total = replace(
                    total,
                    level=max(total.level, self.iteration(source)),
                    raises=True,
                    is_async=total.is_async or bool(g.is_async),
                )
                names: dict[str, Info] = {}
                self.bind(g.target, Info(item_type(source.type), PURE, False, source.sites), names)
                self._scopes.append(names)
                depth += 1
                for test in g.ifs:
                    i = self.expr(test)
                    total = self._both(total, replace(i, level=max(i.level, i.touch)))
            infos = [self.expr(e) for e in elements]
        finally:
            del self._scopes[len(self._scopes) - depth :]
        for i in infos:
            total = self._both(total, i)
        return infos, total

    @staticmethod
    def iteration(source: Info) -> int:
        """The level of iterating: a value that may be an iterator is used up, which is a write."""
        if source.type == ANY:
            return WRITES
        return source.touch

    def _ListComp(self, node: ast.ListComp) -> Info:
        (item,), total = self._comprehension(node, node.generators, [node.elt])
        t, sites = self._fresh(node, item.type, item.sites)
        return replace(total, type=t, sites=sites)

    def _SetComp(self, node: ast.SetComp) -> Info:
        (item,), total = self._comprehension(node, node.generators, [node.elt])
        self.escaped |= item.sites
        return replace(total, type=ANY, sites=frozenset(), raises=True)

    def _DictComp(self, node: ast.DictComp) -> Info:
        (key, value), total = self._comprehension(node, node.generators, [node.key, node.value])
        self.escaped |= key.sites | value.sites
        return replace(total, type=ANY, sites=frozenset(), raises=True)

    def _GeneratorExp(self, node: ast.GeneratorExp) -> Info:
        if not self._immediate:
            self._capture(node)
        (item,), total = self._comprehension(node, node.generators, [node.elt])
        if self._immediate:
            return replace(total, type=sequence_of(item.type), sites=item.sites)
        self.escaped |= item.sites
        return replace(total, type=ANY, sites=frozenset())

    def _Lambda(self, node: ast.Lambda) -> Info:
        if not self._immediate:
            self._capture(node)
        _, defaults = self._all([*node.args.defaults, *node.args.kw_defaults])
        self.escaped |= defaults.sites
        return replace(defaults, type=ANY, sites=frozenset())

    def _capture(self, node: ast.AST) -> None:
        for name in _held_names(node):
            if any(name in s for s in self._scopes):
                continue
            info = self.lookup(name)
            if info is not None:
                self.captures.append((node, name))
                self.escaped |= info.sites

    def body_level(self, node: ast.expr) -> tuple[int, bool]:
        """(level, may raise) of calling a function-valued argument: a lambda, a pure function, or something opaque."""
        if isinstance(node, ast.Lambda):
            names = {a.arg: Info(ANY) for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
            with self.scope(names):
                i = self.expr(node.body)
            return i.level, True
        value = self.resolver.resolve(node)
        if value is None or (isinstance(node, ast.Constant) and node.value is None):
            return PURE, False
        if getattr(value, "__flowc_pure__", False) or (isinstance(value, type) and value.__module__ == "builtins"):
            return READS, True
        if isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType) and self._known(value):
            return READS, True
        return WRITES, True

    # -- operators
    def _BinOp(self, node: ast.BinOp) -> Info:
        (a, b), total = self._all([node.left, node.right])
        level = max(total.level, a.touch, b.touch)
        op = type(node.op)
        if a.type == TEXT and b.type == TEXT and op is ast.Add:
            return replace(total, type=TEXT, level=level, sites=frozenset())
        if a.type in NUMBERS and b.type in NUMBERS:
            result = FLOAT if FLOAT in (a.type, b.type) or op is ast.Div else INT
            if op is ast.Pow:
                result = ANY
            return replace(
                total, type=result, level=level, raises=total.raises or op not in (ast.Add, ast.Sub, ast.Mult)
            )
        if a.type == TEXT and op is ast.Mod:
            return replace(total, type=TEXT, level=level, raises=True, sites=frozenset())
        if op is ast.Mult and TEXT in (a.type, b.type) and {a.type, b.type} & {INT, BOOL}:
            return replace(total, type=TEXT, level=level, sites=frozenset())
        if op is ast.Add and a.type.name == b.type.name == "list":
            t, sites = self._fresh(node, join(item_type(a.type), item_type(b.type)), frozenset())
            inner = total.sites if may_hold_lists(item_type(t)) else frozenset()
            return replace(total, type=t, level=total.level, sites=sites | inner)
        if op is ast.Add and a.type == b.type == DOCS:
            return replace(total, type=DOCS, level=level, sites=frozenset())
        return Info(
            ANY,
            max(level, READS if not (is_scalar(a.type) and is_scalar(b.type)) else PURE),
            True,
            total.sites,
            total.is_async,
        )

    def _Compare(self, node: ast.Compare) -> Info:
        infos, total = self._all([node.left, *node.comparators])
        level = max([total.level, *(i.touch for i in infos)])
        same = all(is_scalar(i.type) for i in infos)
        identity = all(isinstance(o, (ast.Is, ast.IsNot)) for o in node.ops)
        equality = all(isinstance(o, (ast.Eq, ast.NotEq)) for o in node.ops) and same
        ordered = same and (all(i.type in NUMBERS for i in infos) or all(i.type == TEXT for i in infos))
        known = identity or equality or ordered
        result = BOOL if known or all(is_immutable(i.type) for i in infos) else ANY
        return Info(result, total.level if identity else level, total.raises or not known, frozenset(), total.is_async)

    def _BoolOp(self, node: ast.BoolOp) -> Info:
        infos, total = self._all(node.values)
        level = max([total.level, *(i.touch for i in infos[:-1])])
        return replace(
            total,
            type=join(*(i.type for i in infos)),
            level=level,
            raises=total.raises or any(i.touch for i in infos[:-1]),
        )

    def _UnaryOp(self, node: ast.UnaryOp) -> Info:
        i = self.expr(node.operand)
        level = max(i.level, i.touch)
        if isinstance(node.op, ast.Not):
            return Info(BOOL, level, i.raises or i.touch > 0, frozenset(), i.is_async)
        t = INT if i.type in (INT, BOOL) else FLOAT if i.type == FLOAT and not isinstance(node.op, ast.Invert) else ANY
        return Info(t, level, i.raises or t == ANY, frozenset(), i.is_async)

    def _IfExp(self, node: ast.IfExp) -> Info:
        (test, a, b), total = self._all([node.test, node.body, node.orelse])
        return replace(
            total, type=join(a.type, b.type), level=max(total.level, test.touch), raises=total.raises or test.touch > 0
        )

    def _Subscript(self, node: ast.Subscript) -> Info:
        base, index = self.expr(node.value), self.expr(node.slice)
        total = self._both(base, index)
        level = max(total.level, base.touch, index.touch)
        is_slice = isinstance(node.slice, ast.Slice)
        sites: frozenset[Site] = base.sites
        t = ANY
        if is_slice:
            if base.type in (TEXT, DOCS, BYTES):
                t = base.type
            elif base.type.name == "list":
                inner = base.sites if may_hold_lists(item_type(base.type)) else frozenset()
                t, sites = self._fresh(node, item_type(base.type), inner)
            return Info(t, level, True if t == ANY else not _constant_slice(node.slice), sites, total.is_async)
        if base.type.name == "tuple" and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, int):
            if -len(base.type.args) <= node.slice.value < len(base.type.args):
                t = base.type.args[node.slice.value]
        elif index.type in (INT, BOOL):
            t = item_type(base.type) if base.type != ANY else ANY
        if not may_hold_lists(t):
            sites = frozenset()
        return Info(t, level, True, sites, total.is_async)

    def _Slice(self, node: ast.Slice) -> Info:
        return self._all([node.lower, node.upper, node.step])[1]

    def _Starred(self, node: ast.Starred) -> Info:
        i = self.expr(node.value)
        sites = i.sites if may_hold_lists(item_type(i.type)) else frozenset()
        return replace(i, level=max(i.level, self.iteration(i)), raises=True, sites=sites)

    def _NamedExpr(self, node: ast.NamedExpr) -> Info:
        i = self.expr(node.value)
        if self._scopes:
            self._scopes[0][node.target.id] = replace(i, level=PURE, raises=False)
        return i

    def _Attribute(self, node: ast.Attribute) -> Info:
        value = self.resolver.constant(node)
        if value is not MISSING:
            return Info(type_of(value))
        static = self.resolver.resolve(node)
        if static is not MISSING and isinstance(
            static, (types.FunctionType, types.BuiltinFunctionType, type, types.ModuleType)
        ):
            return Info(ANY)
        base = self.expr(node.value)
        fields = DOC_FIELDS if base.type == DOC else DOCS_FIELDS if base.type == DOCS else {}
        if node.attr in fields:
            return Info(fields[node.attr], base.level, base.raises, frozenset(), base.is_async)
        return Info(ANY, max(base.level, READS), True, base.sites, base.is_async)

    def _Await(self, node: ast.Await) -> Info:
        i = self.expr(node.value)
        self.escaped |= i.sites
        called = node.value.func if isinstance(node.value, ast.Call) else None
        target = self.resolver.resolve(called) if called is not None else MISSING
        declared = self._trust(_declared(target)) if inspect.iscoroutinefunction(target) else ANY
        return Info(declared, WRITES, True, frozenset(), True)

    # -- calls
    def _Call(self, node: ast.Call) -> Info:
        target = self.resolver.resolve(node.func)
        arguments = [*node.args, *(k.value for k in node.keywords)]
        if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
            _, parts = self._all([node.func, *(a.value if isinstance(a, ast.Starred) else a for a in arguments)])
            return self._opaque(node, parts, self._trust(_annotated(target)))
        if isinstance(node.func, ast.Attribute) and target is MISSING:
            return self._method(node, node.func, arguments)
        immediate, self._immediate = (
            self._immediate,
            self._known(target) and getattr(target, "__name__", "") in _CONSUMERS,
        )
        try:
            infos, parts = self._all(arguments)
        finally:
            self._immediate = immediate
        if target is MISSING:
            callee = self.expr(node.func)
            return self._opaque(node, replace(self._both(callee, parts), sites=callee.sites | parts.sites))
        level = max([parts.level, *(i.touch for i in infos)])
        if getattr(target, "__flowc_pure__", False):
            return Info(self._trust(_annotated(target)), level, True, parts.sites, parts.is_async)
        if isinstance(target, type) and issubclass(target, BaseException):
            return Info(ANY, level, True, parts.sites, parts.is_async)
        if self._known(target):
            return self._builtin(node, target, infos, replace(parts, level=level))
        return self._opaque(node, parts, self._trust(_annotated(target)))

    def _trust(self, declared: Type) -> Type:
        self.trusts |= declared != ANY
        return declared

    @staticmethod
    def _known(target: Any) -> bool:
        """Is it a builtin or library function that is known to be pure?"""
        name, module = getattr(target, "__name__", None), getattr(target, "__module__", None)
        try:
            if target in _BUILTINS:
                return True
        except TypeError:
            return False
        if isinstance(name, str) and isinstance(module, str) and module in _MODULES and callable(target):
            names = _MODULES[module]
            return names is None or name in names
        return False

    def _builtin(self, node: ast.Call, target: Any, infos: list[Info], parts: Info) -> Info:
        level, raises = parts.level, True
        functions = [k.value for k in node.keywords if k.arg in ("key", "default_factory")]
        if target in (map, filter) and node.args:
            functions.append(node.args[0])
        for f in functions:
            inner, _ = self.body_level(f)
            level = max(level, inner)
        for i in infos:
            if target in _ITERATES:
                level = max(level, self.iteration(i))
        first = infos[0].type if infos else NONE
        sites: frozenset[Site] = parts.sites
        result = _RESULT.get(target, ANY)
        if target is len:
            has_length = first.name == "sequence" or (is_immutable(first) and not is_scalar(first))
            raises = not (has_length or first in (TEXT, BYTES))
        elif (
            target in (str, repr, format, ascii, bool)
            or (target is int and first in (INT, BOOL))
            or (target is float and first in NUMBERS)
        ):
            raises = not all(is_immutable(i.type) for i in infos) or target is format
        elif target in (callable, range):
            raises = target is range and not (len(infos) < 3 and all(i.type in (INT, BOOL) for i in infos))
        if target in (list, sorted):
            item = item_type(first) if infos else NEVER
            inner_sites = parts.sites if may_hold_lists(item) else frozenset()
            t, sites = self._fresh(node, item, inner_sites)
            return Info(t, level, True, sites, parts.is_async)
        if target is tuple:
            return Info(sequence_of(item_type(first)) if infos else tuple_of(), level, True, sites, parts.is_async)
        if target in (min, max):
            result = join(*(i.type for i in infos)) if len(infos) > 1 and not node.keywords else item_type(first)
        elif target is sum:
            result = item_type(first) if item_type(first) in (INT, FLOAT) and len(infos) == 1 else ANY
            result = ANY if result == FLOAT else result  # sum of no floats is the int 0
        elif target is abs and first in (INT, FLOAT):
            result = first
        elif target is round and first in NUMBERS:
            result = INT if len(infos) == 1 else ANY
        elif target in (set, frozenset, dict):
            self.escaped |= parts.sites
            sites = frozenset()
        if not may_hold_lists(result):
            sites = frozenset()
        return Info(result, level, raises or parts.raises, sites, parts.is_async)

    def _method(self, node: ast.Call, func: ast.Attribute, arguments: list[ast.expr]) -> Info:
        base = self.expr(func.value)
        immediate, self._immediate = self._immediate, base.type == TEXT and func.attr in _CONSUMERS
        try:
            infos, parts = self._all(arguments)
        finally:
            self._immediate = immediate
        total = self._both(base, parts)
        level = max([total.level, base.touch, *(i.touch for i in infos)])
        if base.type == TEXT and func.attr in TEXT_METHODS:
            t, raises = TEXT_METHODS[func.attr]
            if func.attr in ("split", "rsplit") and not arguments:
                raises = False
            if (
                func.attr in ("find", "count", "startswith", "endswith", "replace")
                and infos
                and all(i.type == TEXT for i in infos)
            ):
                raises = False
            if func.attr == "join" and infos:
                level = max(level, self.iteration(infos[0]))
                raises = not (item_type(infos[0].type) == TEXT and infos[0].type.name == "list")
            if func.attr == "format":
                raises = True
            sites: frozenset[Site] = frozenset()
            if t.name == "list":
                t, sites = self._fresh(node, TEXT)
            return Info(t, level, total.raises or raises, sites, total.is_async)
        if base.type.name == "list" and func.attr in LIST_METHODS:
            if func.attr == "copy":
                inner = base.sites if may_hold_lists(item_type(base.type)) else frozenset()
                t, sites = self._fresh(node, item_type(base.type), inner)
                return Info(t, level, total.raises, sites, total.is_async)
            return Info(INT, level, True, frozenset(), total.is_async)
        if base.type == DOCS and func.attr in ("count", "index"):
            return Info(INT, level, True, frozenset(), total.is_async)
        return self._opaque(node, replace(total, sites=base.sites | parts.sites))

    def _generic(self, node: ast.expr) -> Info:
        children = [c for c in ast.iter_child_nodes(node) if isinstance(c, ast.expr)]
        _, total = self._all(children)
        return self._opaque(node, total)

    # -- statements
    def bind(self, target: ast.expr, value: Info, names: dict[str, Info]) -> None:
        """What the variables of an assignment target become; attribute and item targets let the value escape."""
        value = replace(value, level=PURE, raises=False, is_async=False)
        if isinstance(target, ast.Name):
            names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            plain = not any(isinstance(e, ast.Starred) for e in target.elts)
            parts = (
                value.type.args
                if value.type.name == "tuple" and plain and len(value.type.args) == len(target.elts)
                else None
            )
            for i, e in enumerate(target.elts):
                inner = parts[i] if parts else item_type(value.type)
                if isinstance(e, ast.Starred):
                    self.bind(e.value, Info(ANY, sites=value.sites), names)
                    self.escaped |= value.sites
                else:
                    self.bind(e, Info(inner, sites=value.sites if may_hold_lists(inner) else frozenset()), names)
        elif isinstance(target, (ast.Attribute, ast.Subscript)):
            self.escaped |= value.sites | self.expr(target.value).sites
        elif isinstance(target, ast.Starred):
            self.bind(target.value, Info(ANY, sites=value.sites), names)

    def _stmt(self, s: ast.stmt) -> Info:
        env = self._scopes[-1]
        match s:
            case ast.Expr():
                return self.expr(s.value)
            case ast.Assign():
                i = self.expr(s.value)
                extra = PURE
                for t in s.targets:
                    self.bind(t, i, env)
                    extra = max(extra, _target_level(t))
                unpacks = any(not isinstance(t, ast.Name) for t in s.targets)
                return replace(
                    i,
                    level=max(i.level, extra, self.iteration(i) if unpacks and extra < WRITES else PURE),
                    raises=i.raises or unpacks,
                )
            case ast.AnnAssign(value=None):
                return Info(NONE)
            case ast.AnnAssign():
                assert s.value is not None
                i = self.expr(s.value)
                self.bind(s.target, i, env)
                return replace(i, level=max(i.level, _target_level(s.target)))
            case ast.AugAssign():
                return self._aug(s, env)
            case ast.If():
                test = self.expr(s.test)
                total = replace(test, level=max(test.level, test.touch), raises=test.raises or test.touch > 0)
                return self._both(total, self._branches([s.body, s.orelse], env))
            case ast.For() | ast.AsyncFor():
                source = self.expr(s.iter)
                total = replace(source, level=max(source.level, self.iteration(source)), raises=True)
                self.bind(s.target, Info(item_type(source.type), sites=source.sites), env)
                total = replace(
                    total,
                    level=max(total.level, _target_level(s.target)),
                    is_async=total.is_async or isinstance(s, ast.AsyncFor),
                )
                return self._both(total, self._loop([*s.body], s.orelse, env))
            case ast.While():
                return self._loop([ast.Expr(s.test), *s.body], s.orelse, env)
            case ast.Raise():
                _, total = self._all([s.exc, s.cause])
                return replace(total, raises=True)
            case ast.Assert():
                _, total = self._all([s.test, s.msg])
                return replace(total, level=max(total.level, READS), raises=True)
            case ast.Pass() | ast.Break() | ast.Continue():
                return Info(NONE)
            case _:
                return self._opaque_stmt(s, env)

    def _aug(self, s: ast.AugAssign, env: dict[str, Info]) -> Info:
        if isinstance(s.target, ast.Name):
            current = self._Name(ast.Name(s.target.id, ast.Load()))
            probe = ast.BinOp(ast.Name(s.target.id, ast.Load()), s.op, s.value)
            ast.copy_location(probe, s)
            i = self._BinOp(probe)
            if not is_scalar(current.type) and current.type.name != "tuple":  # in place: lists change
                i = self._opaque(s, replace(i, sites=i.sites | current.sites))
            env[s.target.id] = replace(i, level=PURE, raises=False)
            return i
        value = self.expr(s.value)
        self.bind(s.target, value, env)
        return self._opaque(s, value)

    def _branches(self, bodies: Sequence[Sequence[ast.stmt]], env: dict[str, Info]) -> Info:
        total = Info(NONE)
        outcomes: list[dict[str, Info]] = []
        for body in bodies:
            own = dict(env)
            total = self._both(total, self.stmts(body, own))
            outcomes.append(own)
        for name in {n for o in outcomes for n in o}:
            found = [o[name] for o in outcomes if name in o]
            outer = self._outer(name) if len(found) < len(outcomes) else None
            if outer is not None:
                found.append(outer)
            env[name] = Info(join(*(f.type for f in found)), sites=frozenset().union(*(f.sites for f in found)))
        return total

    def _outer(self, name: str) -> Info | None:
        for scope in reversed(self._scopes[:-1]):
            if name in scope:
                return scope[name]
        return self.lookup(name)

    def _loop(self, body: Sequence[ast.stmt], orelse: Sequence[ast.stmt], env: dict[str, Info]) -> Info:
        total = self._branches([body, []], env)
        total = self._both(total, self._branches([body, []], env))  # what one turn binds, the next one reads
        widened = {n: i.type for n, i in env.items()}
        total = self._both(total, self._branches([body, []], env))
        for name, i in env.items():
            if widened.get(name) != i.type:
                env[name] = replace(i, type=ANY)
        total = self._both(total, self._branches([body, []], env))
        return self._both(replace(total, raises=True), self.stmts(orelse, env))

    def _opaque_stmt(self, s: ast.stmt, env: dict[str, Info]) -> Info:
        """`with`, `try`, `match`, `import`, nested definitions, `del`: opaque, whatever they name escapes."""
        if isinstance(s, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            self._capture(s)
            env[s.name] = Info(ANY)
        from_liveness = [n for n in ast.walk(s) if isinstance(n, ast.Name)]
        for n in from_liveness:
            if isinstance(n.ctx, ast.Load):
                i = self._outer(n.id) if n.id not in env else env[n.id]
                if i is not None:
                    self.escaped |= i.sites
            else:
                env[n.id] = Info(ANY)
        is_definition = isinstance(s, (ast.FunctionDef, ast.AsyncFunctionDef)) and not s.decorator_list
        return Info(NONE, PURE if is_definition else WRITES, not is_definition, is_async=awaits(s))


def awaits(node: ast.AST) -> bool:
    """Does code of this function (not of functions nested in it) await?"""
    pending = [node]
    while pending:
        n = pending.pop()
        if isinstance(n, (ast.Await, ast.AsyncWith, ast.AsyncFor)) or (isinstance(n, ast.comprehension) and n.is_async):
            return True
        if n is not node and isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            continue
        if n is node and isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            return False
        pending.extend(ast.iter_child_nodes(n))
    return False


def free_names(node: ast.AST) -> list[str]:
    """Names that an expression or nested definition reads from outside itself, in order of appearance."""
    return list(reads_in_order(node))


def _held_names(node: ast.AST) -> list[str]:
    """Variables that a lambda, generator or nested definition reads later, when it runs: not its defaults."""
    match node:
        case ast.GeneratorExp():
            first = ast.comprehension(node.generators[0].target, ast.Constant(None), node.generators[0].ifs, 0)
            return free_names(ast.GeneratorExp(node.elt, [first, *node.generators[1:]]))
        case ast.Lambda():
            return free_names(ast.Lambda(_without_defaults(node.args), node.body))
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            bare = copy(node)
            bare.decorator_list, bare.args, bare.returns = [], _without_defaults(node.args), None
            return free_names(bare)
        case _:
            return free_names(node)


def _without_defaults(args: ast.arguments) -> ast.arguments:
    bare = copy(args)
    bare.defaults, bare.kw_defaults = [], []
    return bare


def _target_level(target: ast.expr) -> int:
    if isinstance(target, (ast.Attribute, ast.Subscript)):
        return WRITES
    if isinstance(target, (ast.Tuple, ast.List)):
        return max(map(_target_level, target.elts), default=PURE)
    return _target_level(target.value) if isinstance(target, ast.Starred) else PURE


def _constant_slice(node: ast.expr) -> bool:
    assert isinstance(node, ast.Slice)
    return all(
        p is None or isinstance(p, ast.Constant) or (isinstance(p, ast.UnaryOp) and isinstance(p.operand, ast.Constant))
        for p in (node.lower, node.upper)
    ) and (node.step is None or (isinstance(node.step, ast.Constant) and bool(node.step.value)))


def _is_resource(value: Any) -> bool:
    return bool(getattr(type(value), "__flowc_resource__", False))


def _annotated(target: Any) -> Type:
    """What calling a function gives, as far as it is declared: a coroutine for an `async def`."""
    return ANY if inspect.iscoroutinefunction(target) else _declared(target)


def _declared(target: Any) -> Type:
    """The declared result type of a function; ANY where nothing is declared or it cannot be evaluated."""
    fn = getattr(target, "fn", target)
    if not isinstance(fn, types.FunctionType) or "return" not in fn.__annotations__:
        return ANY
    raw = fn.__annotations__["return"]
    if isinstance(raw, str):
        try:
            raw = typing.get_type_hints(fn).get("return", inspect.Parameter.empty)
        except Exception:  # an annotation that cannot be evaluated says nothing
            return ANY
    return annotation_type(raw)


def result_type(target: Any) -> Type:
    """The declared result type of a function or tool (of an async one: what awaiting it gives)."""
    return _declared(target)


_RESULT: dict[Any, Type] = {
    len: INT, str: TEXT, int: INT, float: FLOAT, bool: BOOL, repr: TEXT, format: TEXT, ascii: TEXT, chr: TEXT, ord: INT,
    isinstance: BOOL, issubclass: BOOL, callable: BOOL, hasattr: BOOL, any: BOOL, all: BOOL, range: RANGE, hash: INT,
    bytes: BYTES,
    hex: TEXT, oct: TEXT, bin: TEXT,
}  # fmt: skip
_ITERATES = frozenset(
    {list, sorted, tuple, min, max, sum, any, all, set, frozenset, dict, enumerate, zip, map, filter, reversed}
)
_BUILTINS = frozenset({*_RESULT, *_ITERATES, abs, round, divmod, pow, slice, complex, id, type, getattr} - {getattr})
