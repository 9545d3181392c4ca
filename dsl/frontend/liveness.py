"""What a block of Python reads, binds and leaves: the facts that turn variables into SSA values."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from typing import TypeGuard

from .source import children

RETURN_VALUE = "<return>"


def reads(node: ast.AST | Iterable[ast.AST]) -> set[str]:
    """Every name of the enclosing function that a piece of code may read or delete, nested functions included."""
    return set(reads_in_order(node))


def reads_in_order(node: ast.AST | Iterable[ast.AST]) -> dict[str, None]:
    """As `reads`, by first appearance. What a comprehension, a lambda or a nested function binds is its own."""
    found: dict[str, None] = {}

    def visit(n: ast.AST, own: frozenset[str]) -> None:
        match n:
            case ast.Name():
                if not isinstance(n.ctx, ast.Store) and n.id not in own:
                    found[n.id] = None
            case ast.AugAssign(target=ast.Name(id=name)):
                if name not in own:
                    found[name] = None
                visit(n.value, own)
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                first, *rest = n.generators
                visit(first.iter, own)
                inner = own | {x.id for g in n.generators for x in ast.walk(g.target) if _is_stored(x)}
                parts: list[ast.AST] = [
                    first.target,
                    *first.ifs,
                    *(x for g in rest for x in (g.iter, g.target, *g.ifs)),
                ]
                parts += [n.key, n.value] if isinstance(n, ast.DictComp) else [n.elt]
                visit_all(parts, inner)
            case ast.Lambda():
                visit_all([*n.args.defaults, *n.args.kw_defaults], own)
                visit(n.body, own | _parameters(n.args))
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                annotations = [a.annotation for a in ast.walk(n.args) if isinstance(a, ast.arg)]
                visit_all([*n.decorator_list, *n.args.defaults, *n.args.kw_defaults, *annotations, n.returns], own)
                outer = {x for d in ast.walk(n) if isinstance(d, (ast.Global, ast.Nonlocal)) for x in d.names}
                visit_all(n.body, own | _parameters(n.args) | (binds(n.body, appends=False) - outer))
            case ast.ClassDef():
                visit_all([*n.decorator_list, *n.bases, *(k.value for k in n.keywords)], own)
                visit_all(n.body, own | binds(n.body, appends=False))
            case _:
                visit_all(children(n), own)

    def visit_all(nodes: Iterable[ast.AST | None], own: frozenset[str]) -> None:
        for child in nodes:
            if child is not None:
                visit(child, own)

    visit_all([node] if isinstance(node, ast.AST) else node, frozenset())
    return found


def _is_stored(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def _parameters(args: ast.arguments) -> set[str]:
    return {a.arg for a in ast.walk(args) if isinstance(a, ast.arg)}


def binds(node: ast.AST | Iterable[ast.AST], *, appends: bool = True) -> set[str]:
    """Every variable of the enclosing function that a piece of code may bind or delete; appending to a list counts as
    binding it.
    """
    found: set[str] = set()

    def visit(n: ast.AST, comprehension: frozenset[str]) -> None:
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(n.name)
            for inner in (*n.decorator_list, *([] if isinstance(n, ast.ClassDef) else n.args.defaults)):
                visit(inner, comprehension)
            return
        if isinstance(n, ast.Lambda):
            for inner in n.args.defaults:
                visit(inner, comprehension)
            return
        if isinstance(n, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            own = frozenset(x.id for g in n.generators for x in ast.walk(g.target) if isinstance(x, ast.Name))
            for child in children(n):
                visit(child, comprehension | own)
            return
        if isinstance(n, ast.NamedExpr):
            found.add(n.target.id)  # binds in the function even inside a comprehension
            visit(n.value, comprehension)
            return
        if isinstance(n, ast.Name) and isinstance(n.ctx, (ast.Store, ast.Del)) and n.id not in comprehension:
            found.add(n.id)
        elif appends and (name := appended(n)) is not None:
            found.add(name)
        elif isinstance(n, ast.ExceptHandler) and n.name:
            found.add(n.name)
        elif isinstance(n, (ast.Import, ast.ImportFrom)):
            found.update((a.asname or a.name.split(".")[0]) for a in n.names)
        elif isinstance(n, (ast.MatchAs, ast.MatchStar)) and n.name:
            found.add(n.name)
        elif isinstance(n, ast.MatchMapping) and n.rest:
            found.add(n.rest)
        for child in children(n):
            visit(child, comprehension)

    for top in [node] if isinstance(node, ast.AST) else list(node):
        visit(top, frozenset())
    return found


def surely_binds(node: ast.AST) -> set[str]:
    """Variables that evaluating an expression surely binds with `:=`."""
    match node:
        case ast.NamedExpr():
            return {node.target.id} | surely_binds(node.value)
        case ast.IfExp():
            return surely_binds(node.test) | (surely_binds(node.body) & surely_binds(node.orelse))
        case ast.BoolOp():
            return surely_binds(node.values[0])
        case ast.Compare():
            return surely_binds(node.left) | surely_binds(node.comparators[0])
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            return surely_binds(node.generators[0].iter)
        case ast.Lambda():
            return set()
        case _:
            return {n for child in children(node) for n in surely_binds(child)}


def appended(node: ast.AST) -> str | None:
    """The variable of a statement `name.append(item)`, which rebinds it where its list is a value."""
    match node:
        case ast.Expr(ast.Call(ast.Attribute(ast.Name(id=name), "append"), [item], [])) if not isinstance(
            item, ast.Starred
        ):
            return name
    return None


def exits(node: ast.AST | Sequence[ast.AST]) -> set[str]:
    """How a piece of code may leave the block it stands in: some of "return", "break", "continue".

    A `break` of a loop inside the piece does not leave it.
    """
    found: set[str] = set()

    def visit(nodes: Iterable[ast.AST], in_loop: bool) -> None:
        for n in nodes:
            match n:
                case ast.Return():
                    found.add("return")
                case ast.Break() | ast.Continue():
                    if not in_loop:
                        found.add("break" if isinstance(n, ast.Break) else "continue")
                case ast.For() | ast.AsyncFor() | ast.While():
                    visit(n.body, True)
                    visit(n.orelse, in_loop)
                case ast.If():
                    visit(n.body, in_loop)
                    visit(n.orelse, in_loop)
                case ast.Try() | ast.TryStar():
                    for block in (n.body, n.handlers, n.orelse, n.finalbody):
                        visit(block, in_loop)
                case ast.With() | ast.AsyncWith() | ast.ExceptHandler() | ast.match_case():
                    visit(n.body, in_loop)
                case ast.Match():
                    visit(n.cases, in_loop)
                case _:  # expressions and nested functions leave nothing
                    pass

    visit([node] if isinstance(node, ast.AST) else node, False)
    return found


def falls_through(stmts: Sequence[ast.stmt]) -> bool:
    """May control reach the end of the block? (False only where it surely cannot.)"""
    for s in stmts:
        if isinstance(s, (ast.Return, ast.Raise, ast.Break, ast.Continue)):
            return False
        if isinstance(s, ast.If) and s.orelse and not falls_through(s.body) and not falls_through(s.orelse):
            return False
        if isinstance(s, ast.Try):
            if s.finalbody and not falls_through(s.finalbody):
                return False
            if not falls_through([*s.body, *s.orelse]) and not any(falls_through(h.body) for h in s.handlers):
                return False
    return True


class Liveness:
    """For every statement of a function the variables that may still be read after it."""

    def __init__(self, body: Sequence[ast.stmt]) -> None:
        self.after: dict[int, frozenset[str]] = {}
        self.head: dict[int, frozenset[str]] = {}  # of a loop: read by the next turn before it is bound there
        self.done: dict[int, frozenset[str]] = {}  # of a loop: read after it, in its `else` or later
        self.handlers: dict[int, frozenset[str]] = {}  # of a try: read by its handlers or its finally
        self.at_entry = self._block(body, frozenset({RETURN_VALUE}), None, None, frozenset())

    def _block(
        self,
        stmts: Sequence[ast.stmt],
        live: frozenset[str],
        on_break: frozenset[str] | None,
        on_continue: frozenset[str] | None,
        on_error: frozenset[str],
    ) -> frozenset[str]:
        for s in reversed(stmts):
            live = self._stmt(s, live, on_break, on_continue, on_error) | on_error
        return live

    def _stmt(
        self,
        s: ast.stmt,
        live: frozenset[str],
        on_break: frozenset[str] | None,
        on_continue: frozenset[str] | None,
        on_error: frozenset[str],
    ) -> frozenset[str]:
        self.after[id(s)] = self.after.get(id(s), frozenset()) | live
        match s:
            case ast.Return():
                return frozenset(reads(s.value) if s.value else ()) | {RETURN_VALUE}
            case ast.Raise():
                return frozenset(reads(s))
            case ast.Break():
                return on_break if on_break is not None else live
            case ast.Continue():
                return on_continue if on_continue is not None else live
            case ast.If():
                then = self._block(s.body, live, on_break, on_continue, on_error)
                other = self._block(s.orelse, live, on_break, on_continue, on_error)
                return then | other | reads(s.test)
            case ast.For() | ast.AsyncFor() | ast.While():
                after_loop = self._block(s.orelse, live, on_break, on_continue, on_error) if s.orelse else live
                test = reads(s.test) if isinstance(s, ast.While) else frozenset()
                targets = binds(s.target) if not isinstance(s, ast.While) else set()
                head = after_loop | test
                while True:
                    body = self._block(s.body, head, live, head, on_error)
                    grown = head | (body - targets)
                    if grown == head:
                        break
                    head = grown
                self.head[id(s)] = (body - targets) | test
                self.done[id(s)] = after_loop | live
                extra = reads(s.iter) if not isinstance(s, ast.While) else set()
                return head | extra
            case ast.Try() | ast.TryStar():
                final = self._block(s.finalbody, live, on_break, on_continue, on_error) if s.finalbody else live
                caught: frozenset[str] = frozenset()
                for h in s.handlers:
                    inner = self._block(h.body, final, on_break, on_continue, on_error)
                    caught |= (inner - ({h.name} if h.name else set())) | (reads(h.type) if h.type else set())
                if s.finalbody:
                    caught |= final
                self.handlers[id(s)] = caught
                out = self._block(s.orelse, final, on_break, on_continue, on_error) if s.orelse else final
                return self._block(s.body, out, on_break, on_continue, on_error | caught) | caught
            case ast.With() | ast.AsyncWith():
                inner = self._block(s.body, live, on_break, on_continue, on_error)
                return inner | reads([i.context_expr for i in s.items])
            case ast.Assign(targets=targets_, value=value) if all(_plain(t) for t in targets_):
                return (live - binds(targets_)) | reads(value)
            case ast.AnnAssign(target=ast.Name(), value=value) if value is not None:
                return (live - binds(s.target)) | reads(value)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                return (live - {s.name}) | reads(s)
            case _:
                return live | reads(s)


def _plain(target: ast.expr) -> bool:
    """Does assigning to the target bind plain variables and read nothing?"""
    if isinstance(target, (ast.Tuple, ast.List)):
        return all(map(_plain, target.elts))
    if isinstance(target, ast.Starred):
        return _plain(target.value)
    return isinstance(target, ast.Name)
