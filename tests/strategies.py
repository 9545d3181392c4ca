"""Random workflow graphs for property tests: every operation and kind of region, names and texts that do their worst.

What comes out obeys the rules (`flowc.ir.verify`). It need not make sense to run: random programs that do are in
`tests/programs.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from hypothesis import strategies as st

from flowc.ir.core import Attr, Attrs, Graph, Op, Region, Value
from flowc.ir.errors import Loc
from flowc.ir.templates import join_template
from flowc.ir.types import (
    AHEAD,
    ANY,
    BOOL,
    DOCS,
    INT,
    KV,
    NONE,
    SCAN,
    TEXT,
    VECTOR,
    Type,
    item_type,
    join,
    list_of,
    tuple_of,
    type_of,
)
from flowc.ir.verifier import subsumes

NAMES = (
    *(
        "x",
        "draft",
        "question",
        "größe",
        "名",
        "_",
        "0",
        "x0",
        "loc",
        "seq",
        "body",
        "then",
        "return",
        "yield",
        "workflow",
    ),
    *("true", "none", "inf", "nan", "b", "a b", '"', "\\", "%", "@", "\n", "", "\ud800", "\u202e", "é", "py"),
)
"""Names of values, resources and keywords: a text form that quotes well holds all of them."""

IDENTIFIERS = ("x", "y", "items", "größe", "none_", "true", "inf", "nan", "b", "body", "loc", "seq", "question")

TEXTS = (
    *("", " ", "plain", "{}", "{{", "a\nb", "\n", '"', '"""', "\\", "\\n", "\t", "\r\n", "\x00", "\x85", "\u2028", "#"),
    *("\ud83d\ude00", "\ud800", "😀", "\ufeff", "é", "// not a comment", "# nor this", "%x", "@y", "loc(", "}", "'"),
    "Context:\n{}\n\nQuestion: {}\nAnswer, in at most three sentences, from the context alone and from nothing else:",
    "a first line that is long enough to make the printer think of a block of lines\nand a second",
    "a first line that is long enough to make the printer think of a block of lines  \n\n  and one with spaces  ",
    '  a first line that is long enough to make the printer think of a block of lines\n"""and one with the quotes',
)

STATEMENTS = (
    "{out} = 1",
    "{out} = 0\nfor i in range(3):\n    {out} += i",
    "if True:\n\t{out} = 1\nelse:\n\t{out} = 2",
    '{out} = """two\nlines"""',
    "{out} = 1  \n\n# a comment\n",
    "{out} = 'ünï\\u2028'\nprint({out})",
)
EXPRESSIONS = (
    "1",
    "len('x')",
    "'\"' + \"'\"",
    "[i for i in range(3)]",
    "lambda: (yield)",
    "{1: {2}}",
    '"""a\nb"""',
    "(\n1\n)",
)

texts = st.one_of(st.sampled_from(TEXTS), st.text(st.characters(exclude_categories=()), max_size=12))
names = st.sampled_from(NAMES)
numbers = st.one_of(
    st.integers(-(2**70), 2**70), st.just(-(2**4096)), st.floats(allow_nan=False), st.sampled_from((0, 1, -0.0))
)
literals: st.SearchStrategy[Attr] = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts, st.binary(max_size=6)),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)
locs = st.one_of(
    st.none(),
    st.builds(
        Loc,
        st.sampled_from(("app.py", "app.py", "app.py", "", '<ipython-input-"1">', "ordner/größe.py", "a\nb")),
        st.integers(0, 300),
        st.integers(0, 90),
        st.sampled_from((0, 0, 5, 91)),
    ),
)


class _Maker:
    """Draws one workflow op by op."""

    def __init__(self, draw: st.DrawFn, callees: Sequence[Graph] = (), max_depth: int = 3) -> None:
        self.draw = draw
        self.callees = callees
        self.max_depth = max_depth
        self.taken: set[str] = set()
        self.visible: list[Value] = []
        self.cells: list[Value] = []
        self.ops: list[Op] = []
        self.makers: dict[str, str] = {}
        self.depth = 0

    # -- parts
    def pick(self, *choices: str) -> str:
        return self.draw(st.sampled_from(choices))

    def flip(self) -> bool:
        return self.draw(st.booleans())

    def name(self) -> str:
        stem = self.draw(names)
        name, count = stem or "v", 0
        while name in self.taken:
            count += 1
            name = f"{stem}.{count}"
        self.taken.add(name)
        return name

    def new(self, type: Type) -> Value:
        return Value(self.name(), type)

    def emit(
        self,
        name: str,
        operands: Sequence[Value] = (),
        types: Sequence[Type] = (ANY,),
        attrs: dict[str, Attr] | None = None,
        regions: Sequence[Region] = (),
    ) -> tuple[Value, ...]:
        attrs = dict(attrs or {})
        if self.draw(st.integers(0, 9)) == 0:
            attrs["wave"], attrs["batch"] = 1, self.draw(texts)
        results = tuple(map(self.new, types))
        self.ops.append(Op(name, tuple(operands), results, Attrs(attrs), tuple(regions), self.draw(locs)))
        self.visible += results
        self.makers.update((v.name, name) for v in results)
        return results

    def value(self, wanted: Type = ANY) -> Value:
        """A visible value of the type, or a new one."""
        found = [v for v in self.visible if subsumes(wanted, v.type)]
        if found and self.pick("old", "old", "old", "new") == "old":
            return self.draw(st.sampled_from(found))
        if wanted == TEXT:
            return self.emit("const", (), (TEXT,), {"value": self.draw(texts)})[0]
        if wanted == ANY:
            literal = self.draw(literals)
            return self.emit("const", (), (type_of(literal) if self.flip() else ANY,), {"value": literal})[0]
        return self.expression(wanted)

    def identifiers(self, count: int) -> tuple[str, ...]:
        return tuple(self.draw(st.permutations(IDENTIFIERS))[:count])

    def effect(self) -> dict[str, Attr]:
        if self.flip():
            return {}
        return {"reads": ("py",), "writes": (self.draw(texts), "py"), "raises": self.flip()}

    def expression(self, type: Type) -> Value:
        operands = [
            self.draw(st.sampled_from(self.visible)) for _ in range(self.draw(st.integers(0, 2))) if self.visible
        ]
        source = self.draw(st.sampled_from(EXPRESSIONS))
        params = self.identifiers(len(operands))
        return self.emit("py", operands, (type,), {"source": source, "params": params, **self.effect()})[0]

    @contextmanager
    def inside(self, types: Sequence[Type] = ()) -> Iterator[Callable[[Sequence[Value]], Region]]:
        """Opens a region; what it gives makes the region of the values to yield."""
        outer, visible, cells = self.ops, len(self.visible), len(self.cells)
        params = tuple(map(self.new, types))
        self.visible += params
        self.ops = []
        self.depth += 1

        def done(yields: Sequence[Value]) -> Region:
            return Region(params, tuple(self.ops), tuple(yields), self.flip())

        try:
            yield done
        finally:
            self.ops = outer
            del self.visible[visible:], self.cells[cells:]
            self.depth -= 1

    def region(self, wanted: Sequence[Type], params: Sequence[Type] = (), *, plain: bool = False) -> Region:
        """A region that yields values of the wanted types."""
        with self.inside(params) as done:
            for _ in range(self.draw(st.integers(0, 2))):
                self.step(plain=plain)
            return done([self.value(t) for t in wanted])

    def types(self) -> list[Type]:
        return self.draw(st.lists(st.sampled_from((ANY, TEXT, INT, list_of(TEXT), tuple_of(TEXT, ANY))), max_size=2))

    # -- operations
    def step(self, *, plain: bool = False) -> None:
        kinds = [
            "const",
            "template",
            "append",
            "concat",
            "equals",
            "undef",
            "bound",
            "expression",
            "statements",
            "cell",
        ]
        if self.depth < self.max_depth:
            kinds += ["if", "while", "foreach", "try", "fused"]
        if not plain:
            kinds += ["embed", "search", "rerank", "generate", "choose", "parse", "tool", "invoke", "call", "awaited"]
            kinds += ["pieces", "kv", "ahead", "advice", *(["each"] if self.depth < self.max_depth else [])]
        getattr(self, f"make_{self.draw(st.sampled_from(kinds))}")(*([True] if plain else []))

    def make_const(self, _: bool = False) -> None:
        literal = self.draw(literals)
        self.emit("const", (), (type_of(literal),), {"value": literal})

    def make_template(self, _: bool = False) -> None:
        segments = tuple(self.draw(st.lists(texts, min_size=1, max_size=3)))
        slots = [self.value() for _ in segments[1:]]
        attrs: dict[str, Attr] = {"text": join_template(segments)}
        if self.flip():
            attrs["formats"] = tuple(self.pick("", "!r", ":>8", "!r:>{}") for _ in slots)
        self.emit("template", slots, (TEXT,), attrs | self.effect())

    def make_append(self, _: bool = False) -> None:
        items = self.value(list_of(TEXT))
        item = self.value()
        self.emit("append", (items, item), (list_of(join(TEXT, item.type)),))

    def make_concat(self, _: bool = False) -> None:
        self.emit("concat", (self.value(), self.value()))

    def make_equals(self, _: bool = False) -> None:
        self.emit("equals", (self.value(),), (BOOL,), {"value": self.draw(literals)})

    def make_undef(self, _: bool = False) -> None:
        self.emit("undef")

    def make_bound(self, _: bool = False) -> None:
        self.emit("bound", (self.value(),), attrs={"variable": self.draw(texts)})

    def make_expression(self, _: bool = False) -> None:
        self.expression(ANY)

    def make_statements(self, _: bool = False) -> None:
        operands = [self.value() for _ in range(self.draw(st.integers(0, 2)))]
        params = self.identifiers(len(operands))
        outs = self.identifiers(self.draw(st.integers(0, 2)))
        sources = [self.draw(st.sampled_from(STATEMENTS)).replace("{out}", out) for out in outs]
        attrs: dict[str, Attr] = {"source": "\n".join(sources) or "pass", "params": params, "outs": outs}
        if self.flip():
            attrs["scope"] = self.draw(texts)
        self.emit("py", operands, [ANY] * len(outs), attrs | self.effect())

    def make_cell(self, _: bool = False) -> None:
        if not self.cells or self.flip():
            (cell,) = self.emit("cell", (self.value(),))
            self.visible.remove(cell)  # a cell is no value: only these two take it
            self.cells.append(cell)
        cell = self.draw(st.sampled_from(self.cells))
        if self.flip():
            self.emit("store", (cell, self.value()), (NONE,))
        if self.flip():
            self.emit("load", (cell,))

    def make_fused(self, _: bool = False) -> None:
        types = self.types()
        self.emit("fused", (), types, None, (self.region(types, plain=True),))

    def make_if(self, plain: bool = False) -> None:
        condition = self.value()
        wanted = self.types()
        then, other = (self.region(wanted, plain=plain) for _ in range(2))
        types = [join(a.type, b.type) for a, b in zip(then.yields, other.yields, strict=True)]
        self.emit("if", (condition,), types, None, (then, other))

    def make_while(self, plain: bool = False) -> None:
        types = self.types()
        inits = [self.value(t) for t in types]
        cond = self.region([ANY], types, plain=plain)
        body = self.region([BOOL, *types], types, plain=plain)
        self.emit("while", inits, types, {"limit": self.draw(st.integers(1, 10**6))}, (cond, body))

    def make_foreach(self, plain: bool = False) -> None:
        items = self.value()
        carried, collects, breaks = self.types(), self.draw(st.integers(0, 2)), self.flip()
        inits = [self.value(t) for t in carried]
        lists = [list_of(TEXT)] * collects
        body = self.region(
            [*([BOOL] if breaks else []), *carried, *lists], [item_type(items.type), *carried], plain=plain
        )
        attrs: dict[str, Attr] = {"breaks": breaks, "collects": collects}
        if not carried and not breaks:
            attrs["parallel"] = True
        self.emit("foreach", (items, *inits), [*carried, *lists], attrs | self.effect(), (body,))

    def make_try(self, plain: bool = False) -> None:
        types = self.types()
        operands = [self.value() for _ in range(self.draw(st.integers(0, 2)))]
        handlers = tuple(
            self.pick("", "ValueError", "(KeyError, IndexError)") for _ in range(self.draw(st.integers(0, 2)))
        )
        attrs: dict[str, Attr] = {"handlers": handlers}
        if operands or self.flip():
            attrs["params"] = self.identifiers(len(operands))
        regions = [self.region(types, plain=plain), *(self.region(types, (ANY,), plain=plain) for _ in handlers)]
        self.emit("try", operands, types, attrs | self.effect(), regions)

    # -- operations on lanes
    def resource(self) -> str:
        return self.draw(names) or "default"

    def options(self, **found: Type) -> tuple[list[Value], dict[str, Attr]]:
        """Some options as keyword operands."""
        chosen = [name for name in found if self.flip()]
        operands = [self.value(found[name]) for name in chosen]
        return operands, {"kw": tuple(chosen)} if chosen or self.flip() else {}

    def make_embed(self) -> None:
        self.emit("embed", (self.value(TEXT),), (VECTOR,), {"resource": self.resource(), "timeout": 1.5})

    def make_search(self) -> None:
        query = self.value(TEXT)
        operands, attrs = self.options(k=INT, nprobe=INT)
        self.emit("search", (query, *operands), (DOCS,), {"resource": self.resource(), **attrs})

    def make_rerank(self) -> None:
        self.emit("rerank", (self.value(TEXT), self.value(DOCS)), (DOCS,), {"resource": self.resource(), "k": 3})

    def make_generate(self) -> None:
        prompt = self.value(TEXT)
        operands, attrs = self.options(max_tokens=INT, stop=ANY)
        attrs |= {"resource": self.resource(), "temperature": self.draw(st.sampled_from((0, 0.0, 0.7, 1)))}
        self.emit("generate", (prompt, *operands), (TEXT,), attrs | self.effect())

    def make_choose(self) -> None:
        self.emit("choose", (self.value(TEXT), self.value()), (TEXT,), {"resource": self.resource()})

    def make_parse(self) -> None:
        attrs: dict[str, Attr] = {
            "resource": self.resource(),
            "model": "Answer",
            "ref": "app:Answer",
            "stop": ("\n", "\ud800"),
        }
        self.emit("parse", (self.value(TEXT),), attrs=attrs)

    def make_tool(self) -> None:
        operands = [self.value() for _ in range(self.draw(st.integers(0, 3)))]
        attrs: dict[str, Attr] = {"tool": self.resource(), "retries": 2, "idempotent": True, **self.effect()}
        if operands and self.flip():
            keywords = self.draw(st.lists(names, min_size=1, max_size=len(operands), unique=True))
            attrs["kw"] = tuple(keywords)
        self.emit("tool", operands, attrs=attrs)

    def make_invoke(self) -> None:
        self.emit(
            "invoke", (self.value(TEXT), self.value()), attrs={"tools": tuple(self.draw(st.lists(names, max_size=2)))}
        )

    # -- operations of the stage level
    def make_pieces(self) -> None:
        operands, attrs = self.options(k=INT, nprobe=INT)
        at: dict[str, Attr] = {"resource": self.resource()}
        (scan,) = self.emit("ivf.begin", (self.value(TEXT), *operands), (SCAN,), {**at, **attrs, "site": 3})
        if self.flip():
            self.emit("ivf.partial", (scan,), (DOCS,), {**at, "confidence": self.draw(st.sampled_from((0, 0.5, 1.0)))})
        (scan,) = self.emit("ivf.scan", (scan,), (SCAN,), {**at, "place": "hybrid"})
        if self.flip():
            self.emit("ivf.finish", (scan,), (DOCS,), {**at, "timeout": 2})

    def make_kv(self) -> None:
        at: dict[str, Attr] = {"resource": self.resource()}
        (kv,) = self.emit("llm.prefill", (self.value(TEXT),), (KV,), at)
        if self.flip():
            (kv,) = self.emit("llm.extend", (kv, self.value(TEXT)), (KV,), at)
        lookahead = tuple(f"{name}#{site}" for site, name in enumerate(self.draw(st.lists(names, max_size=2))))
        attrs: dict[str, Attr] = {**at, "kw": ("kv",), "lookahead": lookahead, "drops": self.flip(), "prefix": 7}
        name = self.pick("generate", "parse")
        if name == "parse":
            attrs["model"] = "Answer"
        self.emit(name, (self.value(TEXT), kv), (TEXT,), attrs)

    def make_ahead(self) -> None:
        """Begun, and perhaps needed, with these operands or others."""
        at: dict[str, Attr] = {"resource": self.resource()}
        query = self.value(TEXT)
        name = self.pick("search", "generate", "embed", "rerank")
        operands = (query, self.value(DOCS)) if name == "rerank" else (query,)
        (begun,) = self.emit(f"ahead.{name}", operands, (AHEAD,), at)
        if self.flip():
            operands = (self.value(TEXT), *operands[1:])
        if self.flip():
            near = (self.value(DOCS),) if name == "search" and self.flip() else ()
            kw = ("ahead", "near")[: 1 + len(near)]
            type = {"generate": TEXT, "embed": VECTOR}.get(name, DOCS)
            self.emit(name, (*operands, begun, *near), (type,), {**at, "kw": kw})

    def make_advice(self) -> None:
        at: dict[str, Attr] = {"resource": self.resource(), "site": self.draw(st.integers(0, 99))}
        texts_ = [self.value(TEXT) for _ in range(self.draw(st.integers(0, 2)))]
        match self.pick("hint", "release", "pin", "prefetch"):
            case "hint":
                self.emit("kv.hint", texts_, (), {**at, "prefix": self.draw(texts), "steps": 1.5})
            case "release":
                self.emit("kv.release", (), (), at)
            case "pin":
                self.emit("kv.pin", texts_, (), {**at, "ttl": 3})
            case _:
                self.emit("cluster.prefetch", (self.value(TEXT),), (), {**at, "window": 0.25})

    def make_each(self) -> None:
        prompt = self.value(TEXT)
        collects = self.draw(st.integers(0, 2))
        lists = [list_of(TEXT)] * collects
        body = self.region(lists, [TEXT])
        attrs: dict[str, Attr] = {"resource": self.resource(), "split": self.draw(texts), "collects": collects}
        self.emit("llm.each", (prompt,), (TEXT, list_of(TEXT), *lists), attrs, (body,))

    def make_awaited(self) -> None:
        self.emit("py", attrs={"source": "await f()", "params": (), "is_async": True})

    def make_call(self) -> None:
        if not self.callees:
            return
        callee = self.draw(st.sampled_from(list(self.callees)))
        operands = [self.value(p.type) for p in callee.params]
        self.emit(
            "call", operands, (callee.result.type if self.flip() else ANY,), {"callee": callee.name, **self.effect()}
        )


@st.composite
def graphs(draw: st.DrawFn, max_ops: int = 12, max_depth: int = 3, with_callees: bool = True) -> Graph:
    """A workflow that verifies, with up to two workflows that it may call; the second may call the first."""
    callees: list[Graph] = []
    if with_callees:
        for name in draw(st.sampled_from(((), ("helper",), ("a b", "größe")))):
            callees.append(_graph(draw, name, callees, 3, 1))
    return _graph(draw, draw(st.sampled_from(("main", "flow.1", '"', "\n"))), callees, max_ops, max_depth)


def _graph(draw: st.DrawFn, name: str, callees: Sequence[Graph], max_ops: int, max_depth: int) -> Graph:
    made = _Maker(draw, callees, max_depth)
    params = tuple(made.new(t) for t in draw(st.lists(st.sampled_from((TEXT, ANY, INT)), max_size=2)))
    made.visible += params
    for _ in range(draw(st.integers(0, max_ops))):
        made.step()
    result = made.value()
    called = {str(op.attrs["callee"]) for op in _all_ops(made.ops) if op.name == "call"}
    extra = draw(st.sets(st.sampled_from([g.name for g in callees] or [""])))
    held = tuple(g for g in callees if g.name in called | extra)
    if draw(st.booleans()):
        held = tuple(reversed(held))
    body = Region(params, tuple(made.ops), (result,), draw(st.booleans()))
    return Graph(name, body, draw(texts), held, draw(locs))


def _all_ops(ops: Sequence[Op]) -> Iterator[Op]:
    for op in ops:
        yield op
        for region in op.regions:
            yield from _all_ops(region.ops)


def without_locs(graph: Graph) -> Graph:
    """The graph with no source location anywhere."""

    def strip(region: Region) -> Region:
        ops = (replace(op, loc=None, regions=tuple(map(strip, op.regions))) for op in region.ops)
        return replace(region, ops=tuple(ops))

    return replace(graph, body=strip(graph.body), loc=None, callees=tuple(map(without_locs, graph.callees)))
