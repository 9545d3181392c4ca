"""Python text to Python functions: `py` operations, `fused` regions, f-strings and exception matchers.

The code is compiled under the user's file name, line numbers and function name, and runs over the user's live globals
and closure cells, so that what it reads is current and its tracebacks point at the source. Names that flowc adds
start with `%`, which no Python source can spell; nothing is ever written into the user's namespace.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import CellType, CodeType, FunctionType
from typing import Any, TypeVar

from flowc.ir.core import Op, Region, Scope, Value, free_values
from flowc.ir.errors import CompileError, Loc, LoopLimitError
from flowc.ir.values import UNDEF

Fn = Callable[..., Any]
Tree = TypeVar("Tree", bound=ast.AST)
ScopeOf = Callable[[Op], Scope]

_CACHE_MAX = 20_000
_code_cache: dict[tuple[Any, ...], tuple[CodeType, int]] = {}


# -- helpers that generated code calls ---------------------------------------------------------------------------------


def raise_unbound(variable: str) -> None:
    raise UnboundLocalError(f"cannot access local variable {variable!r} where it is not associated with a value")


def loop_limit(limit: int, loc: Loc | None, workflow: str) -> LoopLimitError:
    """The error of a loop that would begin one iteration too many."""
    where = f" at {loc.file}:{loc.line}" if loc is not None and loc.line else ""
    return LoopLimitError(
        f"the loop{where} in workflow {workflow} reached its bound of {limit} iterations",
        loc=loc,
        hint="raise the bound where the workflow is declared, or let the loop end earlier",
    )


def _raise(error: BaseException) -> None:
    raise error


def _pick(names: tuple[str, ...], found: Mapping[str, Any]) -> Any:
    values = tuple(found.get(name, UNDEF) for name in names)
    return values[0] if len(names) == 1 else values


_HELPERS: dict[str, Any] = {
    "%UNDEF": UNDEF,
    "%locals": builtins.locals,
    "%pick": _pick,
    "%unbound": raise_unbound,
    "%NameError": NameError,
    "%BaseException": BaseException,
}


# -- small pieces of syntax --------------------------------------------------------------------------------------------


def _literal(value: Any) -> ast.Constant:
    """Any literal that an attribute may hold, tuples of them included: the compiler takes more than the type says."""
    return ast.Constant(value)


def _load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _set(name: str, value: ast.expr) -> ast.stmt:
    return ast.Assign([ast.Name(name, ast.Store())], value)


def _set_all(names: Sequence[str], values: Sequence[ast.expr]) -> list[ast.stmt]:
    """Assigns at once, so that a swap is a swap."""
    if not names:
        return []
    if len(names) == 1:
        return [_set(names[0], values[0])]
    return [
        ast.Assign(
            [ast.Tuple([ast.Name(n, ast.Store()) for n in names], ast.Store())], ast.Tuple(list(values), ast.Load())
        )
    ]


def _call(function: ast.expr, *args: ast.expr) -> ast.Call:
    return ast.Call(function, list(args), [])


def _arguments(names: Iterable[str], where: dict[str, Any]) -> ast.arguments:
    args = [ast.arg(n, **where) for n in names]
    return ast.arguments(posonlyargs=[], args=args, kwonlyargs=[], kw_defaults=[], defaults=[])


def _nodes(roots: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Every node below the roots, in no particular order; a third of what `ast.walk` takes."""
    stack = list(roots)
    while stack:
        node = stack.pop()
        yield node
        for child in node.__dict__.values():
            if type(child) is list:
                stack += [c for c in child if isinstance(c, ast.AST)]
            elif isinstance(child, ast.AST):
                stack.append(child)


def _place(nodes: Iterable[ast.AST], line: int, col: int, end_col: int) -> None:
    """Moves syntax: line 1 becomes `line`; all columns become the op's own, or none where it spans several lines."""
    for node in _nodes(nodes):
        if node._attributes:
            own = node.__dict__
            first = own.get("lineno", 1)
            own["lineno"] = first + line - 1
            own["end_lineno"] = max(first, own.get("end_lineno") or 0) + line - 1
            own["col_offset"], own["end_col_offset"] = col, end_col


def _fill(nodes: Iterable[ast.AST], line: int, col: int = -1, end_col: int = -1) -> None:
    """Puts what has no place yet there."""
    for node in _nodes(nodes):
        if node._attributes and "lineno" not in node.__dict__:
            node.__dict__.update(lineno=line, end_lineno=line, col_offset=col, end_col_offset=end_col)


def _spot(loc: Loc | None, source: str = "") -> tuple[int, int, int]:
    """Line and columns for `_place`. Columns are known only for an op that stands on one line."""
    if loc is None or not loc.line:
        return 1, -1, -1
    if loc.end_col > loc.col and "\n" not in source:
        return loc.line, loc.col, loc.end_col
    return loc.line, -1, -1


def _shifted(code: CodeType, lines: int) -> CodeType:
    """The same code some lines further down: line tables are relative to a code object's first line."""
    if not lines:
        return code
    consts = tuple(_shifted(c, lines) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_firstlineno=code.co_firstlineno + lines, co_consts=consts)


def _inner_code(
    body: list[ast.stmt], args: Iterable[str], outer: Iterable[str], scope: Scope, is_async: bool, line: int
) -> CodeType:
    """The code of `def <scope.function>(args): body`, with every name of `outer` that it uses as a free variable."""
    where: dict[str, Any] = {"lineno": line, "end_lineno": line, "col_offset": -1, "end_col_offset": -1}
    kind = ast.AsyncFunctionDef if is_async else ast.FunctionDef
    function: ast.stmt = kind(scope.function, _arguments(args, where), body, [], **where)
    enclosing = list(outer)
    if enclosing:
        function = ast.FunctionDef("%factory", _arguments(enclosing, where), [function], [], **where)
    code = compile(ast.Module([function], []), scope.filename or "<flowc>", "exec", dont_inherit=True)
    code = next(c for c in code.co_consts if isinstance(c, CodeType))
    if not enclosing:
        return code
    code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == scope.function)
    return _renamed(code, f"%factory.<locals>.{scope.function}", scope.function)


def _renamed(code: CodeType, prefix: str, new: str) -> CodeType:
    """The code with qualified names that begin with `prefix` changed, in the functions inside it too."""
    consts = tuple(_renamed(c, prefix, new) if isinstance(c, CodeType) else c for c in code.co_consts)
    name = code.co_qualname
    return code.replace(
        co_qualname=new + name.removeprefix(prefix) if name.startswith(prefix) else name, co_consts=consts
    )


def _function(code: CodeType, scope: Scope, extra: Mapping[str, Any]) -> Fn:
    cells = []
    for name in code.co_freevars:
        if name in extra:
            cells.append(CellType(extra[name]))
        elif name in _HELPERS:
            cells.append(CellType(_HELPERS[name]))
        else:
            cells.append(scope.cells[name])
    return FunctionType(code, scope.globals, scope.function, None, tuple(cells))


def _parse(source: str, is_expression: bool, loc: Loc | None) -> Any:
    try:
        if is_expression:
            return ast.parse(source if "\n" not in source else f"({source}\n)", mode="eval").body
        return ast.parse(source).body
    except (SyntaxError, ValueError) as e:
        detail = e.msg if isinstance(e, SyntaxError) else str(e)
        raise CompileError(f"the text of a `py` operation is no Python: {detail}: {source!r}", loc=loc) from None


def _compile(make: Callable[[], CodeType], loc: Loc | None, what: str) -> CodeType:
    try:
        return make()
    except (SyntaxError, ValueError, RecursionError) as e:
        detail = e.msg if isinstance(e, SyntaxError) else str(e)
        raise CompileError(f"{what} cannot be compiled: {detail}", loc=loc) from None


# -- py ----------------------------------------------------------------------------------------------------------------


def _is_always_bound(body: list[ast.stmt], names: Iterable[str]) -> bool:
    """Does plain assignment at the top level bind each name, with nothing that could unbind it again?"""
    bound: set[str] = set()
    for statement in body:
        match statement:
            case ast.Assign(targets=targets):
                bound.update(n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
            case ast.AugAssign(target=ast.Name(id=name)) | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
                bound.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                bound.add(name)
            case ast.Expr() | ast.Pass():
                pass
            case _:  # `del`, a handler's name, a loop: look at run time instead
                return False
    return bound.issuperset(names)


def _py_body(op: Op) -> list[ast.stmt]:
    attrs = op.attrs
    source: str = attrs["source"]  # type: ignore[assignment]
    outs: tuple[str, ...] | None = attrs.get("outs")  # type: ignore[assignment]
    params: tuple[str, ...] = attrs["params"]  # type: ignore[assignment]
    parsed = _parse(source, outs is None, op.loc)
    place = _spot(op.loc, source)
    if outs is None:
        body: list[ast.stmt] = [ast.Return(parsed)]
        _place(body, *place)
        return body
    _place(parsed, *place)
    result: ast.expr = _load(outs[0]) if len(outs) == 1 else ast.Tuple([_load(n) for n in outs], ast.Load())
    unbind: list[ast.stmt] = [
        ast.If(ast.Compare(_load(p), [ast.Is()], [_load("%UNDEF")]), [ast.Delete([ast.Name(p, ast.Del())])], [])
        for p in params
        if p in outs
    ]
    give: ast.stmt = ast.Return(result)
    if not _is_always_bound(parsed, outs):
        names = _literal(outs)
        missing = ast.Return(_call(_load("%pick"), names, _call(_load("%locals"))))
        give = ast.Try([give], [ast.ExceptHandler(_load("%NameError"), None, [missing])], [], [])
    _fill([*unbind, give], place[0])
    return [*unbind, *parsed, give]


def py_function(op: Op, scope: Scope) -> Fn:
    """The function that runs a `py` op: operands in order to its result, or to a tuple unless it has one.

    An out that the statements leave unbound is UNDEF. With `is_async` calling it gives a coroutine.
    """
    attrs = op.attrs
    is_async = bool(attrs.get("is_async"))
    loc = op.loc
    line, col, end_col = _spot(loc, str(attrs["source"]))
    if loc is not None and loc.file and loc.file != scope.filename:
        scope = Scope(scope.globals, scope.cells, loc.file, scope.function)
    key = (
        attrs["source"],
        attrs["params"],
        attrs.get("outs"),
        is_async,
        tuple(scope.cells),
        scope.filename,
        scope.function,
        col,
        end_col,
    )
    cached = _code_cache.get(key)
    if cached is None:
        body = _py_body(op)
        params: tuple[str, ...] = attrs["params"]  # type: ignore[assignment]
        outer = [*scope.cells] if attrs.get("outs") is None else [*scope.cells, *_HELPERS]
        code = _compile(lambda: _inner_code(body, params, outer, scope, is_async, line), loc, "a `py` operation")
        if len(_code_cache) >= _CACHE_MAX:
            _code_cache.clear()
        _code_cache[key] = (code, line)
    else:
        code = _shifted(cached[0], line - cached[1])
    return _function(code, scope, {})


# -- template ----------------------------------------------------------------------------------------------------------


def template_segments(text: str) -> list[str]:
    """The constant segments of a template's text, one more than it has slots, braces unescaped."""
    segments = [""]
    i = 0
    while i < len(text):
        pair = text[i : i + 2]
        if pair == "{}":
            segments.append("")
        elif pair in ("{{", "}}"):
            segments[-1] += pair[0]
        else:
            segments[-1] += text[i]
            i -= 1
        i += 2
    return segments


def _joined(op: Op, values: Sequence[ast.expr]) -> ast.expr:
    text: str = op.attrs["text"]  # type: ignore[assignment]
    segments = template_segments(text)
    formats: Sequence[str] = op.attrs.get("formats") or [""] * len(values)  # type: ignore[assignment]
    if len(segments) != len(values) + 1 or len(formats) != len(values):
        raise CompileError(f"a template with {len(segments) - 1} slots has {len(values)} operands", loc=op.loc)
    parts: list[ast.expr] = []
    for segment, value, form in zip(segments, [*values, None], [*formats, ""], strict=True):
        if segment:
            parts.append(ast.Constant(segment))
        if value is not None:
            conversion = -1
            if form.startswith("!"):
                conversion, form = ord(form[1]), form[2:]
            spec = ast.JoinedStr([ast.Constant(form[1:])]) if form.startswith(":") else None
            parts.append(ast.FormattedValue(value, conversion, spec))
    return ast.JoinedStr(parts)


def template_function(op: Op, scope: Scope) -> Fn:
    """The f-string of a `template` op as a function of its operands."""
    line, col, end_col = _spot(op.loc)
    if op.loc is not None and op.loc.file and op.loc.file != scope.filename:
        scope = Scope(scope.globals, {}, op.loc.file, scope.function)
    key = (
        "template",
        op.attrs["text"],
        op.attrs.get("formats"),
        len(op.operands),
        scope.filename,
        scope.function,
        col,
        end_col,
    )
    cached = _code_cache.get(key)
    if cached is None:
        names = [f"%{i}" for i in range(len(op.operands))]
        body: list[ast.stmt] = [ast.Return(_joined(op, [_load(n) for n in names]))]
        _place(body, line, col, end_col)
        code = _compile(lambda: _inner_code(body, names, (), scope, False, line), op.loc, "a template")
        _code_cache[key] = (code, line)
    else:
        code = _shifted(cached[0], line - cached[1])
    return _function(code, scope, {})


# -- simple operations as functions ------------------------------------------------------------------------------------


def append_item(items: Any, item: Any) -> list[Any]:
    return [*items, item]


def concat_lists(first: Any, second: Any) -> list[Any]:
    return [*first, *second]


def equals_function(literal: Any) -> Fn:
    """Is a value this literal? As in a `match`: by identity for None, True and False, else by `==`."""
    if literal is None or literal is True or literal is False:
        return lambda value: value is literal
    return lambda value: value == literal


def bound_function(variable: str) -> Fn:
    def bound(value: Any) -> Any:
        if value is UNDEF:
            raise_unbound(variable)
        return value

    return bound


def store_value(cell: list[Any], value: Any) -> Any:
    cell[0] = value
    return value


# -- try ---------------------------------------------------------------------------------------------------------------


def handler_matcher(op: Op, scope: Scope) -> Fn:
    """`match(error, *operands)`: the index of the handler of a `try` that takes the error, or -1.

    It raises the error before real `except` clauses: the types are looked up in order, as late as Python would, and an
    error in looking them up is raised with the first one as its context.
    """
    handlers: tuple[str, ...] = op.attrs["handlers"]  # type: ignore[assignment]
    params: tuple[str, ...] = op.attrs.get("params") or ()  # type: ignore[assignment]
    line, col, end_col = _spot(op.loc)
    if op.loc is not None and op.loc.file and op.loc.file != scope.filename:
        scope = Scope(scope.globals, scope.cells, op.loc.file, scope.function)
    key = ("match", handlers, params, tuple(scope.cells), scope.filename, scope.function, line, col, end_col)
    cached = _code_cache.get(key)
    if cached is None:
        clauses: list[ast.ExceptHandler] = []
        for index, text in enumerate(handlers):
            taken: list[ast.stmt] = [ast.Return(ast.Constant(index))]
            kind = None
            if text:
                kind = _parse(text, True, op.loc)
            clauses.append(ast.ExceptHandler(kind, None, taken))
            if kind is None:
                break
        else:
            clauses.append(ast.ExceptHandler(None, None, [ast.Return(ast.Constant(-1))]))
        body: list[ast.stmt] = [ast.Try([ast.Raise(_load("%error"), None)], clauses, [], [])]
        _place(body, line, col, end_col)
        args = ["%error", *params]
        code = _compile(
            lambda: _inner_code(body, args, scope.cells, scope, False, line), op.loc, "the handlers of a `try`"
        )
        cached = _code_cache[key] = (code, line)
    function = _function(cached[0], scope, {})

    def match(error: BaseException, *operands: Any) -> Any:
        trace, context = error.__traceback__, error.__context__
        try:
            return function(error, *operands)
        finally:
            error.__traceback__, error.__context__ = trace, context

    return match


def while_handling(function: Fn) -> Fn:
    """`function` run as inside an `except` clause: takes the error that is being handled, then its own arguments.

    So `sys.exc_info()`, `logging.exception` and `traceback.print_exc` in a handler see what Python would show them.
    """

    def handling(error: BaseException, *args: Any) -> Any:
        trace, context = error.__traceback__, error.__context__
        try:
            raise error
        except BaseException:
            error.__traceback__, error.__context__ = trace, context
            return function(*args)

    return handling


# -- fused regions -----------------------------------------------------------------------------------------------------

_OWN_FRAME = (  # syntax with a scope of its own, or that binds names in other ways than by assignment
    ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.GeneratorExp, ast.NamedExpr, ast.Yield,
    ast.YieldFrom, ast.Global, ast.Nonlocal, ast.Import, ast.ImportFrom, ast.Delete, ast.Return,
)  # fmt: skip
_LOOKS_AT_FRAME = {"locals", "vars", "dir", "eval", "exec", "super", "globals", "__class__"}
_STRAIGHT = (ast.Assign, ast.AugAssign, ast.Expr, ast.Pass, ast.Raise, ast.Assert)


def _rename(tree: Tree, names: Mapping[str, str]) -> Tree:
    """The same tree, with variables renamed in place."""
    for node in _nodes([tree]):
        if type(node) is ast.Name:
            node.id = names.get(node.id, node.id)
    return tree


def _is_inlinable(nodes: Sequence[ast.AST], names: set[str], cells: Mapping[str, CellType]) -> bool:
    """May the names be renamed here without looking at scopes?"""
    for root in nodes:
        for node in _nodes([root]):
            if isinstance(node, _OWN_FRAME) or (isinstance(node, ast.Name) and node.id in _LOOKS_AT_FRAME):
                return False
            if isinstance(node, ast.comprehension):
                if node.is_async:
                    return False
                own = {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
                if own & names or own & cells.keys():
                    return False
    return True


class _Fused:
    """The statements of one `fused` region."""

    def __init__(self, scope: Scope, scope_of: ScopeOf, workflow: str) -> None:
        self.scope = scope
        self.scope_of = scope_of
        self.workflow = workflow
        self.extra: dict[str, Any] = {}
        self.is_async = False

    def helper(self, hint: str, value: Any) -> ast.Name:
        name = f"%{hint}{len(self.extra)}"
        self.extra[name] = value
        return _load(name)

    def region(self, region: Region) -> list[ast.stmt]:
        out: list[ast.stmt] = []
        for op in region.ops:
            statements = self.op(op)
            _fill(statements, *_spot(op.loc))  # inner regions and inlined text have their places already
            out += statements
        return out

    def op(self, op: Op) -> list[ast.stmt]:
        args = [_load(f"%{v.name}") for v in op.operands]
        names = [f"%{v.name}" for v in op.results]
        match op.name:
            case "const":
                return [_set(names[0], _literal(op.attrs["value"]))]
            case "undef":
                return [_set(names[0], _load("%UNDEF"))]
            case "template":
                return [_set(names[0], _joined(op, args))]
            case "append":
                return [_set(names[0], ast.List([ast.Starred(args[0], ast.Load()), args[1]], ast.Load()))]
            case "concat":
                return [_set(names[0], ast.List([ast.Starred(a, ast.Load()) for a in args], ast.Load()))]
            case "equals":
                literal = op.attrs["value"]
                same = ast.Is() if literal is None or literal is True or literal is False else ast.Eq()
                return [_set(names[0], ast.Compare(args[0], [same], [_literal(literal)]))]
            case "bound":
                unbound = ast.Expr(_call(_load("%unbound"), _literal(op.attrs["variable"])))
                return [
                    ast.If(ast.Compare(args[0], [ast.Is()], [_load("%UNDEF")]), [unbound], []),
                    _set(names[0], args[0]),
                ]
            case "cell":
                return [_set(names[0], ast.List([args[0]], ast.Load()))]
            case "load":
                return [_set(names[0], ast.Subscript(args[0], ast.Constant(0), ast.Load()))]
            case "store":
                target = ast.Subscript(args[0], ast.Constant(0), ast.Store())
                return [ast.Assign([target], args[1]), *(_set(n, args[1]) for n in names)]
            case "py":
                return self.py(op, args, names)
            case "if":
                then, orelse = ([*self.region(r), *_set_all(names, _values(r.yields))] for r in op.regions)
                return [ast.If(args[0], then or [ast.Pass()], orelse)]
            case "while":
                return self.while_(op, args, names)
            case "foreach":
                return self.foreach(op, args, names)
            case "try":
                return self.try_(op, names)
            case _:
                raise CompileError(f"a fused region cannot hold `{op.name}`", loc=op.loc)

    def py(self, op: Op, args: list[ast.Name], names: list[str]) -> list[ast.stmt]:
        source = str(op.attrs["source"])
        outs: tuple[str, ...] | None = op.attrs.get("outs")  # type: ignore[assignment]
        params: tuple[str, ...] = op.attrs["params"]  # type: ignore[assignment]
        is_async = bool(op.attrs.get("is_async"))
        self.is_async |= is_async
        scope = self.scope_of(op)
        if scope is self.scope and (op.loc is None or op.loc.file in ("", scope.filename)):
            place = _spot(op.loc, source)
            operand = {p: a.id for p, a in zip(params, args, strict=True)}
            if outs is None:
                tree = _parse(source, True, op.loc)
                if _is_inlinable([tree], set(params), scope.cells):
                    statement = _set(names[0], _rename(tree, operand))
                    _place([statement], *place)
                    return [statement]
            else:
                body = _parse(source, False, op.loc)
                inlined = self.straight(op, body, operand, dict(zip(outs, names, strict=True)))
                if inlined is not None:
                    _place(inlined, *place)
                    return inlined
        call: ast.expr = _call(self.helper("py", py_function(op, scope)), *args)
        if is_async:
            call = ast.Await(call)
        if outs is None or len(names) == 1:
            return [_set(names[0], call)]
        target = ast.Tuple([ast.Name(n, ast.Store()) for n in names], ast.Store())
        return [ast.Assign([target], call) if names else ast.Expr(call)]

    def straight(
        self, op: Op, body: list[ast.stmt], operand: dict[str, str], result: dict[str, str]
    ) -> list[ast.stmt] | None:
        """Straight assignments with their names made the region's; None where a function call is safer."""
        if not all(isinstance(s, _STRAIGHT) for s in body):
            return None
        assigned = {n.id for s in body for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        names = assigned | operand.keys()
        if (result.keys() & operand.keys()) - assigned:
            return None  # reads a variable that may be unbound: the function finds out where Python does
        if not result.keys() <= names or not _is_inlinable(body, names, self.scope.cells):
            return None
        mapping = dict(operand)
        head: list[ast.stmt] = []
        bound: set[str] = set()
        stem = f"%{op.results[0].name}" if op.results else f"%{len(self.extra)}"
        for statement in body:
            for node in ast.walk(statement):
                is_read = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
                if isinstance(statement, ast.AugAssign) and node is statement.target:
                    is_read = isinstance(node, ast.Name)
                if not is_read or node.id not in assigned or node.id in bound:  # type: ignore[attr-defined]
                    continue
                if node.id not in operand:  # type: ignore[attr-defined]
                    return None  # not bound yet: the function raises UnboundLocalError under the name's own spelling
                name: str = node.id  # type: ignore[attr-defined]
                unbound = ast.Expr(_call(_load("%unbound"), ast.Constant(name)))
                head.append(ast.If(ast.Compare(_load(operand[name]), [ast.Is()], [_load("%UNDEF")]), [unbound], []))
                bound.add(name)
            bound.update(n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        for name in sorted(assigned):
            mapping[name] = result.get(name, f"{stem}:{name}")
            if name in operand:
                head.append(_set(mapping[name], _load(operand[name])))
        renamed = [_rename(s, mapping) for s in body]
        tail = [_set(new, _load(operand[name])) for name, new in result.items() if name not in assigned]
        return [*head, *renamed, *tail]

    def while_(self, op: Op, args: list[ast.Name], names: list[str]) -> list[ast.stmt]:
        cond, body = op.regions
        limit: int = op.attrs["limit"]  # type: ignore[assignment]
        carried = [f"%{v.name}" for v in cond.params]
        stem = carried[0] if carried else f"%{len(self.extra)}"
        count = f"{stem}:count"
        error = self.helper("limit", lambda: _raise(loop_limit(limit, op.loc, self.workflow)))
        go_on, *following = _values(body.yields)
        again = f"{stem}:again"
        inner: list[ast.stmt] = [
            *self.region(cond),
            ast.If(ast.UnaryOp(ast.Not(), _values(cond.yields)[0]), [ast.Break()], []),
            ast.If(ast.Compare(_load(count), [ast.GtE()], [ast.Constant(limit)]), [ast.Expr(_call(error))], []),
            ast.AugAssign(ast.Name(count, ast.Store()), ast.Add(), ast.Constant(1)),
            *_set_all([f"%{v.name}" for v in body.params], [_load(c) for c in carried]),
            *self.region(body),
            _set(again, go_on),
            *_set_all(carried, following),
            ast.If(ast.UnaryOp(ast.Not(), _load(again)), [ast.Break()], []),
        ]
        return [
            *_set_all(carried, args),
            _set(count, ast.Constant(0)),
            ast.While(ast.Constant(True), inner, []),
            *_set_all(names, [_load(c) for c in carried]),
        ]

    def foreach(self, op: Op, args: list[ast.Name], names: list[str]) -> list[ast.stmt]:
        (body,) = op.regions
        collects = int(op.attrs.get("collects") or 0)  # type: ignore[arg-type]
        item, *carried = (f"%{v.name}" for v in body.params)
        yields = _values(body.yields)
        go_on = yields.pop(0) if op.attrs.get("breaks") else None
        lists = [f"{item}:list{i}" for i in range(collects)]
        again = f"{item}:again"
        inner: list[ast.stmt] = [
            *self.region(body),
            *([_set(again, go_on)] if go_on is not None else []),
            *_set_all(carried, yields[: len(carried)]),
            *(
                ast.Expr(_call(ast.Attribute(_load(into), "extend", ast.Load()), value))
                for into, value in zip(lists, yields[len(carried) :], strict=True)
            ),
            *([ast.If(ast.UnaryOp(ast.Not(), _load(again)), [ast.Break()], [])] if go_on is not None else []),
        ]
        return [
            *_set_all(carried, args[1:]),
            *(_set(name, ast.List([], ast.Load())) for name in lists),
            ast.For(ast.Name(item, ast.Store()), args[0], inner or [ast.Pass()], []),
            *_set_all(names, [_load(n) for n in [*carried, *lists]]),
        ]

    def try_(self, op: Op, names: list[str]) -> list[ast.stmt]:
        body, *handlers = op.regions
        texts: tuple[str, ...] = op.attrs["handlers"]  # type: ignore[assignment]
        params: tuple[str, ...] = op.attrs.get("params") or ()  # type: ignore[assignment]
        operand = {p: f"%{v.name}" for p, v in zip(params, op.operands, strict=True)}
        clauses: list[ast.ExceptHandler] = []
        for text, region in zip(texts, handlers, strict=True):
            kind: ast.expr = _load("%BaseException")
            if text:
                kind = _rename(_parse(text, True, op.loc), operand)
                _place([kind], *_spot(op.loc))
            error = f"%{region.params[0].name}"
            taken: list[ast.stmt] = [
                _set(error, _load(f"{error}:caught")),
                *self.region(region),
                *_set_all(names, _values(region.yields)),
            ]
            clauses.append(ast.ExceptHandler(kind, f"{error}:caught", taken))
        return [ast.Try([*self.region(body), *_set_all(names, _values(body.yields))] or [ast.Pass()], clauses, [], [])]


def _values(values: Iterable[Value]) -> list[ast.expr]:
    return [_load(f"%{v.name}") for v in values]


def fused_function(op: Op, scope: Scope, scope_of: ScopeOf, workflow: str) -> tuple[Fn, bool]:
    """One function for a whole `fused` region, and whether it is a coroutine function.

    It takes the region's free values in the order of `free_values` and returns its yields: the value if there is one,
    else a tuple. Each statement stands at the line of the op it came from. Operations of other scopes or files, and
    text with a scope of its own, are called as functions of their own.
    """
    (region,) = op.regions
    first = next((o.loc for o in region.ops if o.loc is not None and o.loc.file), None)
    if first is not None and first.file != scope.filename:
        scope = Scope(scope.globals, scope.cells, first.file, scope.function)
    original = scope_of(op)
    fused = _Fused(scope, lambda o: scope if scope_of(o) is original else scope_of(o), workflow)
    body = fused.region(region)
    results = _values(region.yields)
    body.append(ast.Return(results[0] if len(results) == 1 else ast.Tuple(results, ast.Load())))
    args = [f"%{v.name}" for v in free_values(region)]
    outer = dict.fromkeys([*scope.cells, *_HELPERS, *fused.extra])
    line = op.loc.line if op.loc is not None and op.loc.line else (first.line if first is not None else 1)
    _fill(body[-1:], max(line, 1))
    make = lambda: _inner_code(body, args, outer, scope, fused.is_async, max(line, 1))  # noqa: E731
    return _function(_compile(make, op.loc, "a fused region"), scope, fused.extra), fused.is_async
