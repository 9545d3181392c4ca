"""Reading documents: what becomes a passage, where passages end, and what is said of what cannot be read."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowc.backends.vector.documents import (
    Block,
    Page,
    Passage,
    embedded_text,
    parse_html,
    parse_markdown,
    parse_text,
    read_jsonl,
    read_passages,
    split_page,
)
from flowc.ir.errors import InputError, ResourceError


def texts(page: Page) -> list[tuple[str, str]]:
    return [(b.kind, b.text) for b in page.blocks]


# ------------------------------------------------------------------------------------------------ HTML
def test_html_keeps_the_text_and_leaves_the_furniture() -> None:
    page = parse_html(
        """<html><head><title>Shop - Acme</title><style>p {color: red}</style></head><body>
        <nav><ul><li>Home</li></ul></nav>
        <div role="main"><h1>2.1. Opening&nbsp;hours<a class="headerlink" href="#x">¶</a></h1>
        <script>track("<p>not text</p>")</script>
        <p>We open at <b>nine</b>,<br>and close at   five.</p>
        <ul><li>Not on Sunday<li>Not on Monday</ul>
        <table><tr><th>Day</th><th>Hours</th></tr><tr><td><p>Friday</p></td><td>9-3</td></tr></table></div>
        <footer>&copy; Acme</footer></body></html>"""
    )
    assert page.title == "Opening hours"
    assert texts(page) == [
        ("heading", "2.1. Opening hours"),
        ("text", "We open at nine, and close at five."),
        ("item", "Not on Sunday"),
        ("item", "Not on Monday"),
        ("text", "Day | Hours"),
        ("text", "Friday | 9-3"),
    ]


def test_html_code_keeps_its_lines_and_definitions_their_anchors() -> None:
    page = parse_html(
        '<h1>m</h1><dl><dt class="sig" id="m.f">m.f(x)</dt><dd><p>Doubles.</p>'
        "<pre>\n    def f(x):\n\n        return 2 * x\n</pre></dd></dl>"
    )
    assert texts(page)[1:] == [("term", "m.f(x)"), ("text", "Doubles."), ("code", "def f(x):\n\n    return 2 * x")]
    assert page.blocks[1].anchors == ("m.f",)


def test_an_anchor_of_an_empty_element_stands_for_the_text_after_it() -> None:
    page = parse_html('<h1>t</h1><p>before</p><section id="later"><h2>Later</h2><p>after</p></section>')
    assert {b.text: b.anchors for b in page.blocks} == {"t": (), "before": (), "Later": ("later",), "after": ()}


def test_html_without_a_main_part_or_heading_takes_all_and_the_title() -> None:
    page = parse_html("<title>  A\npage </title><p>one<p>two")
    assert page.title == "A page"
    assert texts(page) == [("text", "one"), ("text", "two")]
    assert parse_html("just words", "name") == Page("name", (Block("text", "just words"),))


@given(st.text(st.sampled_from("<>/ap dtli\"'=&;!-\n x"), max_size=80))
def test_no_html_makes_the_parser_fail(text: str) -> None:
    page = parse_html(text)
    assert all(b.text for b in page.blocks)


# ------------------------------------------------------------------------------------------------ Markdown, text
def test_markdown_blocks() -> None:
    page = parse_markdown(
        "---\nlang: en\n---\n<!-- hidden -->\n# The *big* title #\n\nA [link](http://x.y) and `a * b * c`, **bold**\n"
        "goes on.\n\nSub\n---\n- one\n  more\n- two\n\n> quoted\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
        "```python\n# no heading\nx = [1](2)\n```\n\n    indented()\n\n***\nlast \\*one\\*"
    )
    assert page.title == "The big title"
    assert texts(page) == [
        ("heading", "The big title"),
        ("text", "A link and a * b * c, bold goes on."),
        ("heading", "Sub"),
        ("item", "one more"),
        ("item", "two"),
        ("text", "quoted"),
        ("text", "a | b"),
        ("text", "1 | 2"),
        ("code", "# no heading\nx = [1](2)"),
        ("code", "indented()"),
        ("text", "last *one*"),
    ]


def test_markdown_title_from_front_matter_and_an_open_fence_at_the_end() -> None:
    page = parse_markdown("---\ntitle: 'Named'\n---\ntext\n```\nnever closed")
    assert page.title == "Named"
    assert texts(page) == [("text", "text"), ("code", "never closed")]


@given(st.text(st.sampled_from("#*_`-=>|[]()\\ ~\n\t1.ab"), max_size=80))
def test_no_markdown_makes_the_parser_fail(text: str) -> None:
    parse_markdown(text)


def test_plain_text_is_paragraphs() -> None:
    assert texts(parse_text("one\nline\n \n\ntwo\n", "t")) == [("text", "one line"), ("text", "two")]


# ------------------------------------------------------------------------------------------------ splitting
def sentence(words: int, tag: str = "W") -> str:
    return " ".join([f"{tag}{n}" for n in range(words - 1)] + ["End."])


def test_blocks_are_packed_until_the_passage_is_full() -> None:
    blocks = tuple(Block("text", sentence(n, f"b{n}x")) for n in (60, 30, 70, 100, 20))
    found = split_page(Page("T", blocks), "s")
    assert [len(p.text.split()) for p in found] == [90, 70, 100, 20]
    assert {(p.title, p.source) for p in found} == {("T", "s")}


def test_a_long_paragraph_is_cut_between_sentences_and_a_long_program_between_lines() -> None:
    long = " ".join(sentence(30) + mark for mark in ("", '"', ")", "", "]") * 2)
    found = split_page(Page("T", (Block("text", long),)), "s")
    assert all("End." in p.text[-5:] and p.text.startswith("W0") for p in found)
    assert " ".join(p.text for p in found) == long
    code = "\n".join(f"    call({n}, {n})" for n in range(300))
    found = split_page(Page("T", (Block("code", code),)), "s")
    assert "\n".join(p.text for p in found) == code
    assert len(found) > 3


def test_titles_name_the_section_and_a_definition_starts_a_passage() -> None:
    page = Page(
        "Page",
        (
            Block("heading", "Page", 1),
            Block("text", sentence(50)),
            Block("term", "f(x)", 0, ("f",)),
            Block("text", sentence(20)),
            Block("heading", "3.2. Other", 2),
            Block("text", sentence(20)),
        ),
    )
    found = split_page(page, "s")
    assert [(p.title, p.text.split("\n")[0][:4], p.anchors) for p in found] == [
        ("Page", "W0 W", ()),
        ("Page", "f(x)", ("f",)),
        ("Page: Other", "W0 W", ()),
    ]


def test_a_tiny_section_joins_the_next_and_a_tiny_rest_the_passage_before() -> None:
    page = Page(
        "P",
        (
            Block("heading", "A", 2),
            Block("text", "Few words."),
            Block("heading", "B", 2),
            Block("text", sentence(98)),
            Block("text", "The rest."),
        ),
    )
    found = split_page(page, "s")
    assert [(p.title, p.text) for p in found] == [("P: A", f"Few words.\nB\n{sentence(98)}\nThe rest.")]


@given(
    st.lists(st.tuples(st.sampled_from(["text", "item", "code", "term", "heading"]), st.integers(1, 300)), max_size=8)
)
def test_no_word_is_lost_and_no_passage_is_too_long(spec: list[tuple[str, int]]) -> None:
    blocks = []
    for n, (kind, size) in enumerate(spec):
        words = [f"x{n}y{w}{'.' if w % 17 == 16 else ''}" for w in range(min(size, 8) if kind == "heading" else size)]
        text = (
            "\n".join(" ".join(words[i : i + 9]) for i in range(0, len(words), 9))
            if kind == "code"
            else " ".join(words)
        )
        blocks.append(Block(kind, text, 2 if kind == "heading" else 0))  # type: ignore[arg-type]
    found = split_page(Page("T", tuple(blocks)), "s")
    said = " ".join(p.text for p in found).split()
    told = [w for b in blocks if b.kind != "heading" for w in b.text.split()]
    assert [w for w in said if w in set(told)] == told
    assert all(len(p.text.split()) <= 180 for p in found)


# ------------------------------------------------------------------------------------------------ folders
def test_a_folder_is_read_in_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "two.md").write_text("# Two\n\nSecond text.")
    (tmp_path / "a.txt").write_text("First text.")
    (tmp_path / "c.html").write_bytes(b'<meta charset="latin-1"><title>C</title><p>caf\xe9')
    (tmp_path / "d.txt").write_bytes("with a mark".encode("utf-16"))
    (tmp_path / "same.txt").write_text("First text.")
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt").write_text("")
    told: list[str] = []
    reading = read_passages(tmp_path, on_file=told.append)
    assert [(p.source, p.title, p.text) for p in reading.passages] == [
        ("a.txt", "a", "First text."),
        ("b/two.md", "Two", "Second text."),
        ("c.html", "C", "café"),
        ("d.txt", "d", "with a mark"),
        ("same.txt", "same", "First text."),
    ]
    assert told == ["a.txt", "b/two.md", "c.html", "d.txt", "empty.txt", "same.txt"]
    assert not reading.errors
    assert read_passages(tmp_path).passages == reading.passages
    assert read_passages(tmp_path / "a.txt").passages == [Passage("First text.", "a", "a.txt")]


def test_a_file_that_is_not_text_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"line one\nline \xff two")
    (tmp_path / "b.txt").write_bytes(b"zero \0 byte")
    (tmp_path / "c.html").write_bytes(b'<meta charset="klingon">x')
    (tmp_path / "d.txt").write_text("fine")
    reading = read_passages(tmp_path)
    assert [p.source for p in reading.passages] == ["d.txt"]
    assert [e.code for e in reading.errors] == ["F080"] * 3
    assert "a.txt:2" in str(reading.errors[0])
    assert "UTF-8" in str(reading.errors[0])
    assert "NUL" in str(reading.errors[1])
    assert "klingon" in str(reading.errors[2])
    with pytest.raises(InputError, match="UTF-8"):
        read_passages(tmp_path, strict=True)


@pytest.mark.parametrize("name", ["missing", "empty", "picture.png"])
def test_nothing_to_read_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(ResourceError) as caught:
        read_passages(tmp_path / name)
    assert caught.value.code == "F061"
    assert caught.value.hint


# ------------------------------------------------------------------------------------------------ JSONL
def test_rows_are_passages(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [
        {"text": "one", "title": "T", "source": "s", "id": "k"},
        {"text": "two", "id": 7, "extra": [1]},
        {"text": "three"},
    ]
    file.write_text("\ufeff" + "\n\n".join(json.dumps(r) for r in rows) + "\n", "utf-8")
    expected = [
        Passage("one", "T", "s", "k"),
        Passage("two", "", "7", "7"),
        Passage("three", "", "rows.jsonl:5"),
    ]
    assert read_passages(file).passages == expected
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert read_jsonl(packed).passages[:2] == expected[:2]
    assert embedded_text(expected[0]) == "T: one"
    assert embedded_text(expected[1]) == "two"


BAD = {
    '{"text": "cut': ("malformed JSON", 9),
    "[1, 2]": ("expected an object, found list", 0),
    '{"title": "t"}': ('"text" is missing', 0),
    '{"text": "  "}': ('"text" is empty', 0),
    '{"text": 5}': ('"text" must be a string, found int', 0),
    '{"text": "x", "source": null}': ('"source" must be a string, found NoneType', 0),
    '{"text": "x", "id": 1.5}': ('"id" must be a string or an integer, found float', 0),
    '{"text": "x", "id": "good"}': ("already used on line 1", 0),
    "[" * 100_000: ("nested", 0),
}


def test_a_malformed_line_is_named_by_its_number_and_the_rest_is_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = ['{"text": "first", "id": "good"}', *BAD, '{"text": "last"}']
    file.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    reading = read_jsonl(file)
    assert [p.text for p in reading.passages] == ["first", "last"]
    assert len(reading.errors) == len(BAD) + 1
    for number, (error, (message, column)) in enumerate(zip(reading.errors, BAD.values(), strict=False), 2):
        assert error.code == "F080"
        assert message in error.message
        assert error.loc is not None
        assert (error.loc.line, error.loc.col) == (number, column)
        assert f"rows.jsonl:{number}" in str(error)
    assert "not UTF-8" in reading.errors[-1].message
    with pytest.raises(InputError, match="malformed JSON"):
        read_jsonl(file, strict=True)


def test_a_truncated_gzip_file_gives_what_it_holds(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"row {n} " + str(hash(str(n) * 9))}) + "\n" for n in range(5000))
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(rows.encode())[:-2000])
    reading = read_jsonl(file)
    assert 100 < len(reading.passages) < 5000
    assert [e.code for e in reading.errors] == ["F080"]
    assert reading.errors[0].loc is not None
    assert reading.errors[0].loc.line == len(reading.passages) + 1


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a \\ud800 b"}')
    assert read_jsonl(file).passages[0].text == "a ? b"
