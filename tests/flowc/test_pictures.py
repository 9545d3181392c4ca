"""Pictures: true, offline, the same bytes every time, and safe whatever the prompts say."""

import base64
import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings

from flowc.ir.builder import Builder
from flowc.ir.core import Graph, Region, map_region
from flowc.ir.errors import CompileError, Loc
from flowc.ir.types import INT, TEXT, list_of
from flowc.passes.manager import PassManager, pipeline
from flowc.pictures import svg
from flowc.pictures.dot import label, to_dot
from flowc.pictures.html import page_of, to_html
from flowc.pictures.json import plan_hash, plan_to_json
from flowc.pictures.layout import Place, lay_out
from flowc.pictures.mermaid import MOST_EDGES, to_mermaid
from flowc.pictures.model import Item, Part, draw
from flowc.pictures.timeline import predict
from tests.strategies import graphs

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]><svg onload=alert(1)>",
    '"><img src=x onerror="alert(1)">',
    "\\N \\G {<port>} \"quoted\" 'single'",
    "\u202eright to left\u202c \u2066isolated\u2069",
    "\u2028 \u2029 \x00 \x1b[31m \ufffe",
    "emoji 🦜 and half a pair \ud83e",
    "@data@ {name} %s ${x}",
    "a" * 20_000,
)


def sample(prompt: str = "Answer: {}", *, ordered: bool = True, parallel: bool = False) -> Graph:
    """question -> split -> search each -> draft, with a loop that judges and improves it."""
    b = Builder("answer", [("question", TEXT)], loc=Loc("qa.py", 3))
    b.loc = Loc("qa.py", 4, 4, 20)
    text = b.generate("default", b.template(prompt, b.params[0]), max_tokens=64)
    (subs,) = b.py("text.splitlines()", text, types=[list_of(TEXT)], hint="subs", writes=(), raises=False)
    b.loc = Loc("qa.py", 5, 4, 20)
    with b.region([("q", TEXT)]) as each:
        each.yields = (b.list_of(b.search("pydocs", each.params[0], k=4)),)
    (notes,) = b.foreach(subs, [], each.done(), collects=1, parallel=parallel or None)
    other = b.search("faq", b.params[0], k=2, hint="faq")
    draft = b.generate("default", b.template("{} {}", notes, other), max_tokens=128, hint="draft")
    with b.region([("draft", TEXT)]) as cond:
        cond.yields = (b.const(True),)
    with b.region([("draft", TEXT)]) as body:
        choice = b.choose("default", b.template(prompt, body.params[0]), b.const(("yes", "no")))
        (ok,) = b.py("choice == 'yes'", choice, params=["choice"], hint="ok", writes=(), raises=False)
        with b.region() as then:
            then.yields = (b.const(False), body.params[0])
        with b.region() as orelse:
            again = b.generate("default", b.template(prompt, notes), hint="draft")
            orelse.yields = (b.const(True), again)
        body.yields = b.if_(ok, then.done(), orelse.done(), ["again", "draft"])
    (final,) = b.while_([draft], cond.done(), body.done(), limit=3)
    b.tool(len, "log", final, writes=("log",))
    graph = b.finish(final)
    return graph if ordered else graph.with_body(map_region(graph.body, lambda r: replace(r, ordered=False)))


def chain(n: int) -> Graph:
    b = Builder("chain", [("x", TEXT)])
    value = b.params[0]
    for _ in range(n):
        value = b.generate("m", value)
    return b.finish(value)


# -- what is drawn


def test_every_operation_is_drawn_once_but_constants() -> None:
    drawing = draw(sample())
    names = [i.op.name for i in drawing.items() if i.op is not None]
    assert names.count("generate") == 3
    assert names.count("search") == 2
    assert names.count("const") == 2  # the regions that hold nothing else; four are left out
    ids = [i.id for i in drawing.items()]
    assert len(ids) == len(set(ids))


def test_edges_join_neighbours_and_tell_data_from_order() -> None:
    drawing = draw(sample())
    by_title: dict[str, Item] = {f"{i.title} {i.subtitle}": i for i in drawing.root.items}
    search, loop = by_title["search faq → faq"], by_title["while, at most 3 times draft"]
    edges = {(e.src, e.dst): e.kind for e in drawing.root.edges}
    each = by_title["for each, in turn items"]
    assert edges[each.id, search.id] == "order"  # as written: one after the other
    assert edges[each.id, loop.id] == "data"  # used deep inside the loop: the edge ends at its box
    relaxed = draw(sample(ordered=False))
    assert (each.id, search.id) not in {(e.src, e.dst) for e in relaxed.root.edges}


def test_order_that_other_edges_imply_is_not_drawn() -> None:
    b = Builder("w", [("x", INT)])
    (a,) = b.py("f(x)", b.params[0], hint="a")
    (c,) = b.py("g(a)", a, hint="c")
    (d,) = b.py("h(x)", b.params[0], hint="d")
    graph = b.finish(b.list_of(a, c, d))
    graph = graph.with_body(replace(graph.body, ordered=False))
    drawn = {(e.src, e.dst, e.kind) for e in draw(graph).root.edges}
    assert ("n0", "n1", "data") in drawn
    assert ("n1", "n2", "order") in drawn
    assert ("n0", "n2", "order") not in drawn


def test_a_very_large_workflow_has_its_boxes_closed() -> None:
    b = Builder("large", [("x", TEXT)])
    with b.region([("y", TEXT)]) as body:
        value = body.params[0]
        for _ in range(30):
            value = b.generate("m", value)
        body.yields = (value,)
    b.foreach(b.params[0], [b.params[0]], replace(body.done(), params=(body.params[0], b.params[0])), parallel=True)
    graph = b.finish(b.params[0])
    closed = [i for i in draw(graph, most_items=10).items() if i.hidden_ops]
    assert [i.hidden_ops for i in closed] == [30]
    assert "30 operations" in closed[0].subtitle


# -- layout


def check_layout(graph: Graph) -> None:
    """Inside its picture, no two items of a part overlap, boxes hold what is in them, and edges lead downwards."""
    layout = lay_out(draw(graph))
    place = {p.item.id: p for p in layout.places}
    assert place.keys() == {i.id for i in layout.drawing.items()}

    def inside(p: Place, outer: tuple[float, float, float, float]) -> bool:
        x, y, w, h = outer
        return p.x >= x - 0.1 and p.y >= y - 0.1 and p.x + p.w <= x + w + 0.1 and p.y + p.h <= y + h + 0.1

    def visit(part: Part, outer: tuple[float, float, float, float]) -> None:
        mine = [place[i.id] for i in part.items]
        assert all(inside(p, outer) for p in mine)
        for a, b in itertools.combinations(mine, 2):
            apart = a.x + a.w <= b.x + 0.1 or b.x + b.w <= a.x + 0.1 or a.y + a.h <= b.y + 0.1 or b.y + b.h <= a.y + 0.1
            assert apart, (a.item.title, b.item.title)
        for e in part.edges:
            assert place[e.src].y + place[e.src].h <= place[e.dst].y
        for item in part.items:
            for inner in item.parts:
                p = place[item.id]
                visit(inner, (p.x, p.y, p.w, p.h))

    visit(layout.drawing.root, (0, 0, layout.width, layout.height))


@pytest.mark.parametrize("ordered", [True, False])
def test_layout_of_the_sample(ordered: bool) -> None:
    check_layout(sample(ordered=ordered))


@settings(max_examples=60)
@given(graphs())
def test_layout_of_any_graph(graph: Graph) -> None:
    check_layout(graph)
    check_layout(graph.with_body(map_region(graph.body, lambda r: replace(r, ordered=False))))


@settings(max_examples=40)
@given(graphs())
def test_every_format_of_any_graph(graph: Graph) -> None:
    ElementTree.fromstring(svg.to_svg(graph, engine="flowc")[0])
    read_page(to_html(graph, captured=graph))
    check_labels(to_dot(graph))
    assert json.loads(plan_to_json(graph))["hash"] == plan_hash(graph)
    assert to_mermaid(graph).startswith("flowchart TD\n")


def test_pictures_are_the_same_every_time() -> None:
    """In another process too, whatever its hash seed."""
    program = (
        "from tests.flowc.test_pictures import sample; from flowc.pictures import svg, html, json, dot; import hashlib;"
        "g = sample(ordered=False);"
        "t = svg.to_svg(g, engine='flowc')[0] + html.to_html(g, captured=g) + json.plan_to_json(g) + dot.to_dot(g);"
        "print(hashlib.sha256(t.encode()).hexdigest())"
    )
    root = Path(__file__).resolve().parents[2]
    seen = set()
    for seed in ("0", "1"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{root / 'src'}:{root}", "PATH": "/usr/bin:/bin"}
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        seen.add(done.stdout)
    assert len(seen) == 1


# -- DOT, SVG, Mermaid, JSON


def check_labels(dot: str) -> None:
    labels = re.findall(r'label="([^"]*)"', dot)
    assert labels
    assert all(re.fullmatch(r"[A-Za-z0-9 _.,:;()+#%=-]{0,60}", text) for text in labels)


@pytest.mark.parametrize("text", HOSTILE)
def test_graphviz_sees_restricted_labels_only(text: str) -> None:
    check_labels(to_dot(sample(text + "{}")))
    assert re.fullmatch(r"[A-Za-z0-9 _.,:;()+#%=-]{1,60}", label(text))


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_prompt_is_in_a_drawing(text: str) -> None:
    drawn, engine = svg.to_svg(sample(text + "{}"), engine="flowc")
    assert engine == "flowc"
    ElementTree.fromstring(drawn)
    assert drawn == svg.to_svg(sample(), engine="flowc")[0]


def test_names_with_unusual_letters_are_drawn_as_they_are() -> None:
    b = Builder("größe", [("naïve", TEXT)])
    drawn, _ = svg.to_svg(b.finish(b.generate("m", b.params[0], hint="réponse")), engine="flowc")
    texts = "".join(ElementTree.fromstring(drawn).itertext())
    assert "réponse" in texts
    assert "naïve" in texts


@pytest.mark.parametrize(
    "program",
    ["sleep 60", "kill -SEGV $$", "exit 3", "echo '<svg><script>alert(1)</script></svg>'", "echo nothing"],
    ids=["hangs", "crashes", "fails", "script", "no picture"],
)
def test_a_graphviz_that_misbehaves_is_left_aside(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "dot"
    fake.write_text(f"#!/bin/sh\ncat >/dev/null\n{program}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(svg, "_CHILD", "raise SystemExit(1)")
    drawn, engine = svg.to_svg(sample(), timeout_s=1.0)
    assert engine == "flowc"
    assert drawn == svg.standalone(draw(sample()))


@pytest.mark.skipif(shutil.which("dot") is None, reason="no Graphviz on the PATH")
def test_graphviz_draws_it_where_there_is_one() -> None:
    drawn, engine = svg.to_svg(sample())
    assert engine == "graphviz"
    assert "for each, in turn" in "".join(ElementTree.fromstring(drawn.encode()).itertext())


def test_mermaid_stays_within_its_viewers_limit() -> None:
    assert to_mermaid(sample()).count("-->") > 10
    with pytest.raises(CompileError, match="at most 500"):
        to_mermaid(chain(MOST_EDGES + 10))


def test_mermaid_nests_boxes() -> None:
    text = to_mermaid(sample())
    assert text.count("subgraph") == text.count("  end") == 7
    assert re.search(r'subgraph n\d+\["while, at most 3 times: draft"\]', text)


def test_the_hash_is_of_what_is_computed() -> None:
    one = sample()
    moved = one.with_body(
        map_region(one.body, lambda r: replace(r, ops=tuple(replace(op, loc=Loc("elsewhere.py", 99)) for op in r.ops)))
    )
    assert plan_hash(one) == plan_hash(moved)
    assert plan_hash(one) != plan_hash(sample("Reply: {}"))
    assert plan_hash(one) != plan_hash(sample(ordered=False))


def test_json_holds_what_json_has_no_form_for() -> None:
    b = Builder("w")
    data = json.loads(plan_to_json(b.finish(b.const((b"\xff", float("nan"), None, True, 1)))))
    (op,) = data["graph"]["body"]["ops"]
    assert op["attrs"]["value"] == [{"bytes": "/w=="}, {"float": "nan"}, None, True, 1]
    assert (data["format"], data["version"]) == ("flowc.plan", 1)


# -- timeline


def test_items_at_once_take_less_than_in_turn() -> None:
    in_turn, at_once = predict(sample()), predict(sample(parallel=True))
    assert at_once.makespan_s < in_turn.makespan_s
    assert len(at_once.bars) == len(in_turn.bars)


def test_of_an_if_the_slower_branch_is_drawn() -> None:
    bars = predict(sample()).bars
    drafts = [b for b in bars if b.title == "generate"]
    assert len(drafts) == 2 + 3  # two before the loop, one in each of its three turns


def test_nothing_starts_before_what_it_needs() -> None:
    timeline = predict(sample(ordered=False))
    by_item: dict[str, float] = {}
    for bar in timeline.bars:
        by_item[bar.item] = max(by_item.get(bar.item, 0.0), bar.end_s)
    drawing = draw(sample(ordered=False))
    first = {bar.item: bar.start_s for bar in reversed(timeline.bars)}
    for edge in drawing.root.edges:
        if edge.src in by_item and edge.dst in first:
            assert by_item[edge.src] <= first[edge.dst] + 1e-9


# -- the page


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text of style and script."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"style": [], "script": []}
        self._in = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag if tag in self.raw else ""
        if self._in:
            self.raw[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in:
            self.raw[self._in][-1] += data


def read_page(text: str) -> tuple[Page, dict[str, object]]:
    """The page, checked for everything that must hold of any page, and its data."""
    page = Page()
    page.feed(text)
    page.close()
    style, (data, script) = page.raw["style"], page.raw["script"]
    assert len(style) == 1
    policy = next(a["content"] or "" for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; ")
    for source in (style[0], script):
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        assert not {"src", "style", "srcdoc", "action", "formaction"} & attrs.keys(), (tag, attrs)
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "foreignobject")
    assert not re.search(r"[<>&\u2028\u2029]", data)
    found: dict[str, object] = json.loads(data)
    return page, found


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_changes_no_tag_of_the_page(text: str) -> None:
    page, data = read_page(to_html(sample(text + "{}"), captured=sample(text + "{}")))
    plain, _ = read_page(to_html(sample(), captured=sample()))
    assert [t for t, _ in page.tags] == [t for t, _ in plain.tags]
    assert data["name"] == "answer"


def test_a_hostile_name_changes_no_tag_either() -> None:
    graph = replace(sample(), name='<script>alert("x")</script>')
    page, data = read_page(to_html(graph, captured=graph, level="<b>"))
    plain, _ = read_page(to_html(sample(), captured=sample(), level="-O2"))
    assert [t for t, _ in page.tags] == [t for t, _ in plain.tags]
    assert data["name"] == graph.name


def test_the_page_is_one_small_file() -> None:
    compilation = PassManager(pipeline(2), level=2).run(sample())
    text = page_of(compilation)
    read_page(text)
    assert len(text) < 150_000
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}


def test_the_page_tells_of_passes_remarks_source_and_costs(tmp_path: Path) -> None:
    source = tmp_path / "qa.py"
    source.write_text("import x\n@workflow\ndef answer(question):\n    first\n    second\n    return 1\nother = 2\n")
    graph = sample()

    def move(region: Region) -> Region:
        return replace(
            region,
            ops=tuple(replace(op, loc=replace(op.loc, file=str(source)) if op.loc else None) for op in region.ops),
        )

    graph = replace(graph.with_body(map_region(graph.body, move)), loc=Loc(str(source), 3))
    compilation = PassManager(pipeline(2), level=2).run(graph)
    _, data = read_page(page_of(compilation))
    assert data["level"] == "-O2"
    sources = data["sources"]
    assert isinstance(sources, list)
    (file,) = sources
    assert file["first"] == 2
    assert file["lines"] == ["@workflow", "def answer(question):", "    first", "    second", "    return 1"]
    passes = data["passes"]
    assert isinstance(passes, list)
    prune = next(p for p in passes if p["name"] == "prune-edges")
    assert prune["changed"]
    assert prune["doc"]
    assert any(len(row) == 4 and row[1] != row[3] for row in prune["diff"])
    remarks, ops = data["remarks"], data["ops"]
    assert isinstance(remarks, list)
    assert isinstance(ops, dict)
    assert len(remarks) == len(compilation.remarks)
    waved = next(r for r in remarks if r["pass"] == "wavefront" and r["fired"])
    assert waved["ids"]
    shown = ops[waved["ids"][-1]]
    assert shown["line"] in ("first", "second")
    assert shown["wave"] is not None
    assert shown["cost_s"] > 0


def test_a_trace_is_drawn_beside_the_prediction() -> None:
    events = [
        {"ph": "M", "pid": 1, "tid": 7, "name": "thread_name", "args": {"name": "llm @default"}},
        {"ph": "X", "pid": 1, "tid": 7, "name": "generate x2", "cat": "batch", "ts": 1000.0, "dur": 500.0},
        {"ph": "X", "pid": 2, "tid": 1, "name": "answer", "cat": "program", "ts": 900.0, "dur": 900.0},
        {"ph": "b", "id": 3, "name": "log", "ts": 1500.0, "args": {"lane": "io"}},
        {"ph": "e", "id": 3, "name": "log", "ts": 1600.0},
        {"ph": "e", "id": 4, "name": "never begun", "ts": 1600.0},
    ]
    _, data = read_page(to_html(sample(), trace={"traceEvents": events}))
    timelines = data["timeline"]
    assert isinstance(timelines, dict)
    bars = timelines["measured"]["bars"]
    assert bars == [
        ["", "generate x2", "llm", 0.0, pytest.approx(5e-4)],
        ["", "log", "io", pytest.approx(5e-4), pytest.approx(6e-4)],
    ]


def test_a_graph_alone_makes_a_page_too() -> None:
    page, data = read_page(to_html(sample()))
    assert data["passes"] == []
    assert [a["id"] for t, a in page.tags if a.get("id", "").startswith("pane-")] == ["pane-after"]  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on the PATH")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=3000 --enable-logging=stderr --v=0"
    )
    return [found, *flags.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]


@pytest.mark.slow
def test_the_page_works_in_a_browser_from_a_folder(browser: list[str], tmp_path: Path) -> None:
    """Scripts run under the page's own policy, hostile text stays text, nothing is refused and nothing is fetched."""
    graph = sample("</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'>{}")
    path = tmp_path / "plan.html"
    path.write_text(page_of(PassManager(pipeline(2), level=2).run(graph)), encoding="utf-8")
    done = subprocess.run(
        [*browser, "--dump-dom", f"{path.as_uri()}#a0"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "<title>answer: flowc plan</title>" in done.stdout
    assert 'id="panel"' in done.stdout
    assert "document.title=&#39;owned&#39;" in done.stdout or "document.title='owned'" in done.stdout
    assert "&lt;img src=x onerror" in done.stdout
    assert "<img" not in done.stdout
    assert done.stdout.count('class="pass') == len(pipeline(2))
    assert "CONSOLE" not in done.stderr, done.stderr
