"""The operation table: everything that is true of an operation by its name is said here, once.

An op's operands are positional values followed by keyword values, whose names are in the attribute `kw`. Options of an
operation that are known at compile time are attributes; those that are not are keyword operands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from .core import Attr, Op, Region
from .types import AHEAD, ANY, BOOL, DOCS, INT, KV, SCAN, TEXT, VECTOR, Type

Rates = Mapping[str, float]
"""Seconds (or seconds per unit) by name; `DEFAULT_RATES` until `flowc calibrate` has measured the machine."""

DEFAULT_RATES: Rates = {
    "py_s": 2e-6,
    "tool_s": 5e-3,
    "embed_s": 12e-3,
    "search_s": 15e-3,
    "rerank_s_per_doc": 20e-3,
    "llm_s_per_prompt_token": 1e-3,
    "llm_s_per_token": 25e-3,
    "prompt_tokens": 256.0,
    "fill": 0.6,  # share of max_tokens that a generation uses
}


@dataclass(frozen=True, slots=True)
class Effect:
    """What running an operation does besides computing its results.

    `reads` and `writes` name state: "py" is everything that opaque Python can reach, any other name is a resource.
    """

    reads: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset()
    may_raise: bool = False
    is_sampled: bool = False  # two runs may differ, although nothing is read

    @property
    def is_pure(self) -> bool:
        """Depends on its operands alone; running it twice, or not at all, changes nothing but errors."""
        return not self.reads and not self.writes and not self.is_sampled

    def __or__(self, other: Effect) -> Effect:
        return Effect(
            self.reads | other.reads,
            self.writes | other.writes,
            self.may_raise or other.may_raise,
            self.is_sampled or other.is_sampled,
        )


PURE = Effect()
RAISES = Effect(may_raise=True)


@dataclass(frozen=True, slots=True)
class AttrSpec:
    """An attribute: its Python types, whether it must be there, and what it means."""

    types: tuple[type, ...]
    doc: str
    required: bool = False


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One row of the table."""

    name: str
    doc: str
    operands: tuple[Type, ...] | None = None  # positional; None: any number of any type
    optional: Mapping[str, Type] = field(default_factory=dict)  # keyword operands
    results: tuple[Type, ...] | None = (ANY,)  # None: any number of any type
    attrs: Mapping[str, AttrSpec] = field(default_factory=dict)
    regions: tuple[str, ...] = ()
    effect: Effect = PURE
    lane: str = "python"
    batch_key: tuple[str, ...] | None = None  # attributes that ops of one batch share; None: never batched
    is_elastic: bool = False
    is_advice: bool = False  # changes when things happen and never what; runs for its timing, fails silently
    has_resource: bool = False  # printed as `name @resource (...)`, kept in the attribute `resource`
    cost_s: Callable[[Op, Rates], float] = lambda op, rates: rates["py_s"]


def _generate_s(op: Op, rates: Rates) -> float:
    tokens = float(op.attr("max_tokens", 256)) * rates["fill"]
    return rates["prompt_tokens"] * rates["llm_s_per_prompt_token"] + tokens * rates["llm_s_per_token"]


def _prefill_s(op: Op, rates: Rates) -> float:
    return rates["prompt_tokens"] * rates["llm_s_per_prompt_token"]


_STR, _INT, _NUM, _BOOL, _NAMES = (str,), (int,), (int, float), (bool,), (tuple,)
_TIMEOUT = AttrSpec((int, float), "seconds after which the operation fails with NodeTimeoutError")
_EFFECT = {
    "reads": AttrSpec(_NAMES, "state that it reads, besides what the table says"),
    "writes": AttrSpec(_NAMES, "state that it writes, besides what the table says"),
    "raises": AttrSpec(_BOOL, "can it raise?"),
}
_KW = {"kw": AttrSpec(_NAMES, "names of the last operands, where they are passed by keyword")}
_RESOURCE = {"resource": AttrSpec(_STR, "the resource it runs on", required=True)}
_SAMPLING = {
    "max_tokens": AttrSpec(_INT, "most tokens to write"),
    "temperature": AttrSpec(_NUM, "0 is greedy"),
    "top_p": AttrSpec(_NUM, "nucleus sampling"),
    "top_k": AttrSpec(_INT, "sample among the k likeliest; 0: all"),
    "min_p": AttrSpec(_NUM, "sample among those at least so probable in proportion to the likeliest"),
    "stop": AttrSpec(_NAMES, "texts that end the generation, not part of it"),
    "seed": AttrSpec(_INT, "makes sampling repeatable"),
}

_PROGRAM: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        # -- plain values
        OpSpec("const", "A literal.", (), attrs={"value": AttrSpec((object,), "the literal", required=True)}),
        OpSpec(
            "template",
            "An f-string: `text` with a `{}` for each operand (`{{` and `}}` are braces).",
            None,
            results=(TEXT,),
            attrs={
                "text": AttrSpec(_STR, "the constant segments with a `{}` for each slot", required=True),
                "formats": AttrSpec(_NAMES, "per slot what stands after the value: `!r`, `:>8`, `!r:>8` or empty"),
                **_EFFECT,
            },
        ),
        OpSpec("append", "A list with one more item.", (ANY, ANY)),
        OpSpec("concat", "One list after another.", (ANY, ANY)),
        OpSpec(
            "equals",
            "Is the value this literal?",
            (ANY,),
            results=(BOOL,),
            attrs={"value": AttrSpec((object,), "the literal", required=True)},
        ),
        OpSpec("undef", "The value of a variable that is not bound.", ()),
        OpSpec(
            "bound",
            "The operand, or UnboundLocalError if the variable is not bound.",
            (ANY,),
            attrs={"variable": AttrSpec(_STR, "the variable's name", required=True)},
            effect=RAISES,
        ),
        OpSpec(
            "py",
            "Plain Python: an expression (one result) or statements that bind `outs`, over `params`.",
            None,
            results=None,
            attrs={
                "source": AttrSpec(_STR, "the Python text", required=True),
                "params": AttrSpec(_NAMES, "the operands' names in the text", required=True),
                "outs": AttrSpec(_NAMES, "names of the results that statements bind; absent: an expression"),
                "scope": AttrSpec(_STR, "the Python scope, where it is not the workflow's"),
                "is_async": AttrSpec(_BOOL, "the text awaits: it runs as a coroutine"),
                **_EFFECT,
            },
        ),
        OpSpec(
            "fused",
            "A straight run of plain Python that executes as one code object, a coroutine where it awaits; yields its "
            "results.",
            (),
            results=None,
            regions=("body",),
        ),
        # -- state of a variable across an error
        OpSpec("cell", "A variable that a handler may read: holds the operand.", (ANY,)),
        OpSpec("load", "What a cell holds.", (ANY,)),
        OpSpec("store", "Puts the second operand into a cell.", (ANY, ANY)),
        # -- control flow
        OpSpec("if", "One of two regions.", (ANY,), results=None, regions=("then", "else")),
        OpSpec(
            "while",
            "Carries its operands around. `cond` yields whether to go on; `body` yields first whether to look at "
            "`cond` again (false is a break), then the next carried values.",
            None,
            results=None,
            attrs={"limit": AttrSpec(_INT, "most iterations", required=True)},
            regions=("cond", "body"),
            effect=RAISES,
        ),
        OpSpec(
            "foreach",
            "Over the first operand's items, carrying the others around. The body takes the item and the carried "
            "values; it yields, with `breaks`, first whether to go on; then the next carried values; then "
            "`collects` lists that are joined in item order. Results: the carried values, then the joined lists. "
            "With `parallel` all items run at once.",
            None,
            results=None,
            attrs={
                "collects": AttrSpec(_INT, "how many lists are joined"),
                "breaks": AttrSpec(_BOOL, "may it end before the last item?"),
                "parallel": AttrSpec(_BOOL, "nothing orders one item after another"),
                **_EFFECT,
            },
            regions=("body",),
            effect=RAISES,
        ),
        OpSpec(
            "try",
            "The body's values, or those of the first handler that takes its error. A handler region has the "
            "error as its parameter; `handlers` holds for each handler the Python expression of its exception "
            "types over `params` (the operands), or empty for all.",
            None,
            results=None,
            attrs={
                "handlers": AttrSpec(_NAMES, "the exception types, in order", required=True),
                "params": AttrSpec(_NAMES, "names of the operands in `handlers`"),
                "scope": AttrSpec(_STR, "the Python scope, where it is not the workflow's"),
                **_EFFECT,
            },
            regions=("body", "*handlers"),
        ),
        OpSpec(
            "call",
            "Another workflow.",
            None,
            attrs={"callee": AttrSpec(_STR, "its name", required=True), **_EFFECT},
            effect=RAISES,
        ),
        # -- resources
        OpSpec(
            "embed",
            "The unit vector of a text.",
            (TEXT,),
            results=(VECTOR,),
            attrs={**_RESOURCE, **_KW, **_EFFECT, "timeout": _TIMEOUT},
            effect=RAISES,
            lane="embed",
            batch_key=("resource",),
            has_resource=True,
            cost_s=lambda op, r: r["embed_s"],
        ),
        OpSpec(
            "search",
            "The `k` passages of an index nearest to a text, best first.",
            (TEXT,),
            optional={"k": INT, "nprobe": INT, "where": ANY, "stop": ANY, "timeout": ANY},
            results=(DOCS,),
            attrs={
                **_RESOURCE,
                **_KW,
                **_EFFECT,
                "k": AttrSpec(_INT, "how many passages"),
                "nprobe": AttrSpec(_INT, "how many clusters to probe"),
                "where": AttrSpec((object,), "conditions on metadata, in the order of `ir.options.as_where`"),
                "stop": AttrSpec((object,), "leave to stop early, which may change results: `ir.options.stop_literal`"),
                "timeout": _TIMEOUT,
            },
            effect=RAISES,
            lane="search",
            batch_key=("resource", "k", "nprobe"),
            is_elastic=True,
            has_resource=True,
            cost_s=lambda op, r: r["search_s"],
        ),
        OpSpec(
            "rerank",
            "The `k` best of the passages for a text, by a cross-encoder.",
            (TEXT, DOCS),
            optional={"k": INT, "timeout": ANY},
            results=(DOCS,),
            attrs={
                **_RESOURCE,
                **_KW,
                **_EFFECT,
                "k": AttrSpec(_INT, "how many passages to keep"),
                "timeout": _TIMEOUT,
            },
            effect=RAISES,
            lane="rerank",
            batch_key=("resource",),
            has_resource=True,
            cost_s=lambda op, r: 8 * r["rerank_s_per_doc"],
        ),
        OpSpec(
            "generate",
            "What the model writes after a prompt.",
            (TEXT,),
            optional={
                "max_tokens": INT,
                "temperature": ANY,
                "top_p": ANY,
                "top_k": INT,
                "min_p": ANY,
                "stop": ANY,
                "seed": ANY,
                "timeout": ANY,
            },
            results=(TEXT,),
            attrs={**_RESOURCE, **_KW, **_EFFECT, **_SAMPLING, "timeout": _TIMEOUT},
            effect=RAISES,
            lane="llm",
            batch_key=("resource",),
            is_elastic=True,
            has_resource=True,
            cost_s=_generate_s,
        ),
        OpSpec(
            "choose",
            "The one of the options (a list of texts) that continues the prompt best.",
            (TEXT, ANY),
            results=(TEXT,),
            attrs={**_RESOURCE, **_KW, **_EFFECT, "timeout": _TIMEOUT},
            effect=RAISES,
            lane="llm",
            batch_key=("resource",),
            has_resource=True,
            cost_s=_prefill_s,
        ),
        OpSpec(
            "parse",
            "An object of the pydantic model `model`, written by the language model as JSON after the prompt.",
            (TEXT,),
            optional={"max_tokens": INT, "temperature": ANY, "seed": ANY, "timeout": ANY},
            attrs={
                **_RESOURCE,
                **_KW,
                **_EFFECT,
                **_SAMPLING,
                "model": AttrSpec(_STR, "the pydantic model's name in the workflow's symbols", required=True),
                "ref": AttrSpec(_STR, "where to import it from: `module:name`"),
                "timeout": _TIMEOUT,
            },
            effect=RAISES,
            lane="llm",
            batch_key=("resource",),
            has_resource=True,
            cost_s=_generate_s,
        ),
        OpSpec(
            "tool",
            "A call of a declared Python function.",
            None,
            attrs={
                **_KW,
                **_EFFECT,
                "tool": AttrSpec(_STR, "its name in the workflow's symbols", required=True),
                "ref": AttrSpec(_STR, "where to import it from: `module:name`"),
                "is_async": AttrSpec(_BOOL, "an async def"),
                "timeout": _TIMEOUT,
                "retries": AttrSpec(_INT, "how often to try again after an error, if it is idempotent"),
                "idempotent": AttrSpec(_BOOL, "may it run twice?"),
            },
            effect=RAISES,
            lane="io",
            cost_s=lambda op, r: r["tool_s"],
        ),
        OpSpec(
            "invoke",
            "The result of the tool that the first operand names, with the mapping in the second as its arguments.",
            (TEXT, ANY),
            attrs={
                **_EFFECT,
                "tools": AttrSpec(_NAMES, "names of the tools it may be", required=True),
                "refs": AttrSpec(_NAMES, "where to import them from"),
            },
            effect=RAISES,
            lane="io",
            cost_s=lambda op, r: r["tool_s"],
        ),
    )
}

_SITE = {"site": AttrSpec(_INT, "number of the place in the workflow that it is about", required=True)}
_STARTED = ("embed", "search", "rerank", "generate", "choose", "parse")


def _advice(name: str, doc: str, lane: str, attrs: Mapping[str, AttrSpec], operands: tuple[Type, ...] | None) -> OpSpec:
    """Work that only moves data: no result, no effect, no error."""
    attrs = {**_RESOURCE, **_SITE, **attrs}
    return OpSpec(name, doc, operands, results=(), attrs=attrs, lane=lane, is_advice=True, has_resource=True)


_search = _PROGRAM["search"]
_STAGES: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        # -- a search in pieces: `search` is `ivf.finish(ivf.scan(ivf.begin(query)))`
        replace(
            _search,
            name="ivf.begin",
            doc="A planned search: which clusters, in which order.",
            optional={**_search.optional, "near": DOCS},
            results=(SCAN,),
            is_elastic=False,
            cost_s=lambda op, r: r["py_s"],
        ),
        OpSpec(
            "ivf.scan",
            "Scans the clusters of a planned search, a bounded step at a time, together with other searches.",
            (SCAN,),
            results=(SCAN,),
            attrs={**_RESOURCE, **_EFFECT, "timeout": _TIMEOUT},
            effect=RAISES,
            lane="search",
            batch_key=("resource",),
            is_elastic=True,
            has_resource=True,
            cost_s=_search.cost_s,
        ),
        OpSpec(
            "ivf.partial",
            "What a search under way has found once that is as likely to be its final result as `confidence` says; its "
            "result if that is never so. The operand is what `ivf.begin` gave. A guess: may differ from run to run.",
            (SCAN,),
            results=(DOCS,),
            attrs={**_RESOURCE, "confidence": AttrSpec(_NUM, "least probability, 0 to 1", required=True)},
            effect=Effect(is_sampled=True),
            lane="search",
            has_resource=True,
            cost_s=_search.cost_s,
        ),
        OpSpec(
            "ivf.finish",
            "The passages that a search has found, best first.",
            (SCAN,),
            results=(DOCS,),
            attrs={**_RESOURCE, **_EFFECT, "timeout": _TIMEOUT},
            effect=RAISES,
            lane="search",
            batch_key=("resource",),
            has_resource=True,
        ),
        # -- a generation in pieces: what is known of its prompt early is computed early
        OpSpec(
            "llm.prefill",
            "Computes the KV cache of a prompt's beginning ahead of the operation that takes it as its operand `kv`.",
            (TEXT,),
            results=(KV,),
            attrs={**_RESOURCE},
            lane="llm",
            is_advice=True,
            has_resource=True,
            cost_s=_prefill_s,
        ),
        OpSpec(
            "llm.extend",
            "The same for a longer beginning (the second operand, whole), once more of it is known.",
            (KV, TEXT),
            results=(KV,),
            attrs={**_RESOURCE},
            lane="llm",
            is_advice=True,
            has_resource=True,
            cost_s=_prefill_s,
        ),
        OpSpec(
            "llm.each",
            "A generation whose text is split while it is written: the body runs for each item once it is closed, all "
            "at once. Results: the text, the list of items, then the lists that the body yields, joined in item order.",
            (TEXT,),
            optional=_PROGRAM["generate"].optional,
            results=None,
            attrs={
                **_PROGRAM["generate"].attrs,
                "split": AttrSpec(_STR, "`lines` for `str.splitlines`, or the separator of `str.split`", required=True),
                "collects": AttrSpec(_INT, "how many lists are joined"),
            },
            regions=("body",),
            effect=RAISES,
            lane="llm",
            batch_key=("resource",),
            is_elastic=True,
            has_resource=True,
            cost_s=_generate_s,
        ),
        # -- the same operation, begun before it is certain that it is needed, or with these operands
        *(
            replace(
                base,
                name=f"ahead.{base.name}",
                doc=f"Begins a `{base.name}` that may turn out not to be needed. One with this as its operand `ahead` "
                "takes its answer if that was asked with equal operands and options, and asks anew if not or if it "
                "failed.",
                results=(AHEAD,),
                effect=PURE,
            )
            for base in map(_PROGRAM.__getitem__, _STARTED)
        ),
        # -- advice
        _advice(
            "kv.hint",
            "Announces that a prompt which begins with `prefix` and then the operands comes in `steps` generations.",
            "llm",
            {
                "prefix": AttrSpec(_STR, "the constant beginning"),
                "steps": AttrSpec(_NUM, "generations of this program until then", required=True),
            },
            None,
        ),
        _advice("kv.release", "Takes back what `kv.hint` announced for the site.", "llm", {}, None),
        _advice(
            "kv.pin",
            "Keeps the KV cache of the operands' texts, one after the other, for `ttl` seconds.",
            "llm",
            {"ttl": AttrSpec(_NUM, "seconds", required=True)},
            None,
        ),
        _advice(
            "cluster.prefetch",
            "Moves to the device the clusters that a search for a text like this will probe in `window` seconds.",
            "search",
            {"window": AttrSpec(_NUM, "seconds until the search", required=True)},
            (TEXT,),
        ),
    )
}


def _with_stages(spec: OpSpec) -> OpSpec:
    """A program-level row with what the passes may hand to it."""
    if spec.name not in _STARTED:
        return spec
    optional = {**spec.optional, "ahead": AHEAD}
    if spec.lane == "llm":
        optional["kv"] = KV
    if spec.lane == "search":
        optional["near"] = DOCS
    return replace(spec, optional=optional)


OPS: dict[str, OpSpec] = {spec.name: _with_stages(spec) for spec in (*_PROGRAM.values(), *_STAGES.values())}
"""The table: the program level, then the stage level that programs are split into."""

CONTROL = frozenset({"if", "while", "foreach", "try"})


def effect_of(op: Op) -> Effect:
    """An op's effect: the table's, what its attributes add, and what its regions do.

    A generation at temperature 0 depends on its operands alone; at any other, or an unknown one, it is sampled.
    A handled error of a `try` body is no error of the `try`.
    """
    spec = OPS[op.name]
    effect = spec.effect
    attrs = op.attrs
    if attrs:
        reads, writes, raises = attrs.get("reads"), attrs.get("writes"), attrs.get("raises")
        if reads or writes or raises is not None:
            effect = Effect(
                effect.reads | frozenset(_texts(reads)),
                effect.writes | frozenset(_texts(writes)),
                effect.may_raise if raises is None else bool(raises),
                effect.is_sampled,
            )
    match op.name:
        case "generate" | "parse" | "llm.each" | "ahead.generate" | "ahead.parse":
            if "temperature" in _texts(attrs.get("kw")) or attrs.get("temperature", 0):
                effect |= Effect(is_sampled=True)
        case "search" | "ivf.begin" | "ivf.scan" | "ivf.partial" | "ivf.finish" | "ahead.search":
            # One that may stop early depends on how it was scanned, and in what company.
            stops = "stop" in attrs or "stop" in _texts(attrs.get("kw"))
            effect |= Effect(reads=frozenset({f"index:{op.attr('resource')}"}), is_sampled=stops)
        case "cell" | "store":
            effect |= Effect(writes=frozenset({f"cell:{(op.operands if op.name == 'store' else op.results)[0].name}"}))
        case "load":
            effect |= Effect(reads=frozenset({f"cell:{op.operands[0].name}"}))
        case "if":
            effect |= truth_effect(op.operands[0].type)
        case "while" if op.regions:
            effect |= truth_effect(op.regions[0].yields[0].type)
        case _:
            pass
    for index, region in enumerate(op.regions):
        inner = effect_of_region(region)
        if op.name == "try" and index == 0 and "" in _texts(attrs["handlers"]):
            inner = Effect(inner.reads, inner.writes, False, inner.is_sampled)
        effect |= inner
    return effect


def truth_effect(t: Type) -> Effect:
    """What asking whether a value of this type is true does: opaque Python may change the answer, or raise instead."""
    if t in (ANY, VECTOR):
        return Effect(reads=frozenset({"py"}), may_raise=True)
    return Effect(reads=frozenset({"py"})) if t.name == "sequence" else PURE


def effect_of_region(region: Region) -> Effect:
    """The union of a region's effects; a cell that lives inside it is nobody else's business."""
    effect = PURE
    own: set[str] = set()
    for op in region.ops:
        effect |= effect_of(op)
        if op.name == "cell":
            own.add(f"cell:{op.results[0].name}")
    if own:
        effect = Effect(effect.reads - own, effect.writes - own, effect.may_raise, effect.is_sampled)
    return effect


def _texts(attr: Attr) -> tuple[str, ...]:
    return tuple(str(a) for a in attr) if isinstance(attr, tuple) else ()


def keyword_operands(op: Op) -> dict[str, int]:
    """Keyword name -> index of its operand."""
    names = _texts(op.attrs.get("kw"))
    first = len(op.operands) - len(names)
    return {name: first + i for i, name in enumerate(names)}


COMMON_ATTRS: dict[str, AttrSpec] = {
    "group": AttrSpec(
        _INT, "operations of one region with this number run at once, as `asyncio.gather` has it, whatever they write"
    ),
}
"""What the frontend writes on any op."""

SCHEDULE_ATTRS: dict[str, AttrSpec] = {
    "site": AttrSpec(_INT, "number of this place in the workflow, for advice about it"),
    "lookahead": AttrSpec(_NAMES, "`resource#site` of each `cluster.prefetch` to predict again while this is written"),
    "prefix": AttrSpec(_INT, "number of the constant prefix that its prompt begins with"),
    "drops": AttrSpec(_BOOL, "nobody continues its prompt: the KV cache behind the constant prefix is dropped at once"),
    "place": AttrSpec(_STR, "where it runs: `cpu`, `gpu` or `hybrid`"),
    "wave": AttrSpec(
        _INT, "level of the op among its region's lane operations: equal levels of many programs run as one batch"
    ),
    "batch": AttrSpec(_STR, "operations with equal batch keys may share a backend call, across programs too"),
}
"""What the scheduling passes write on any op."""
