"""The extractive reader: how it reads prompts, what it quotes, and how often that comes from the right passage."""

from __future__ import annotations

import gzip
import json
import math
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from flowc.backends.llm.extract import Passage, coverage, inverse_frequencies, split_sentences, stem, terms
from flowc.backends.llm.reader import ReaderBackend, read_prompt, split_question, support
from flowc.ir.errors import InputError
from flowc.ir.values import Doc, Docs
from flowc.runtime.protocols import ChooseRequest, GenerateRequest, Generation, LLMBackend

SORTING = Docs(
    [
        Doc(1, "Tuples are immutable. Once a tuple has been created, you can’t replace its elements.", 2, "", "FAQ"),
        Doc(2, "Use sorted() to get a new list. list.sort() sorts in place: >>> x.sort()", 1, "", "HOWTO: Sorting"),
    ]
)
GENERATORS = Docs([Doc(3, "A generator is a function that returns an iterator. It contains yield.", 1, "", "Glossary")])


def say(prompt: str, **options: Any) -> str:
    result = ReaderBackend().generate([GenerateRequest(prompt, **options)])[0]
    assert isinstance(result, Generation), result
    return result.text


def pick(prompt: str, *options: str) -> int | Exception:
    return ReaderBackend().choose([ChooseRequest(prompt, options)])[0]


def ask(docs: object, question: str) -> str:
    return f"Answer from the context.\n\nContext:\n{docs}\n\nQuestion: {question}\nAnswer:"


def test_is_honest_about_what_it_is() -> None:
    reader = ReaderBackend()
    assert isinstance(reader, LLMBackend)
    assert reader.kind == "extractive-reader"
    assert "not a language model" in str(reader.info().detail)


# Reading prompts


def test_passages_titles_and_the_question_are_found() -> None:
    reading = read_prompt(ask(SORTING, "How do I sort a list?"))
    assert reading.question == "How do I sort a list?"
    assert [(p.mark, p.title) for p in reading.passages] == [("[1]", "FAQ"), ("[2]", "HOWTO: Sorting")]
    assert [p.text for p in reading.passages] == [d.text for d in SORTING]
    assert "Answer from the context." in reading.instruction


@pytest.mark.parametrize(
    "context",
    [
        f"{[SORTING, GENERATORS]}",
        f"{[SORTING]}{GENERATORS}",
        f"{[Docs(), SORTING, Docs(), GENERATORS]}",
        f"{SORTING}\n\n{GENERATORS}",
    ],
)
def test_printed_lists_of_results_are_taken_apart(context: str) -> None:
    reading = read_prompt(ask(context, "Why?"))
    assert [p.text for p in reading.passages] == [d.text for d in (*SORTING, *GENERATORS)]
    assert [p.mark for p in reading.passages] == ["[1]", "[2]", "[1]"]


def test_passages_with_line_breaks_and_brackets_stay_whole() -> None:
    docs = Docs(
        [
            Doc(1, "Write this:\n\ndef f(x):\n    return x[0]\n\nIt gives the first item, see [7] and (a, [1] b)."),
            Doc(2, "The end is x[1]"),
        ]
    )
    reading = read_prompt(ask(docs, "What does f give?"))
    assert len(reading.passages) == 2
    assert reading.passages[0].text.endswith("see [7] and (a, [1] b).")
    assert reading.passages[1].text == "The end is x[1]"


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("Question: first?\nNotes.\nQuestion: second one\nAnswer:", "second one"),
        ("Q: Why is it so?\nA:", "Why is it so?"),
        ("Be brief. What is yield?", "What is yield?"),
        ("What is yield? How is it used?\n\nAnswer:", "What is yield? How is it used?"),
        ("Write a passage that answers: How does it work?", "How does it work?"),
        ("Original question: why so slow?\nBetter answer:", "why so slow?"),
        ("Some instruction here.\n\nthe last paragraph", "the last paragraph"),
        ("Translate: the last words", "the last words"),
        ("", ""),
    ],
)
def test_where_the_question_is(prompt: str, question: str) -> None:
    assert read_prompt(prompt).question == question


def test_sentences() -> None:
    assert split_sentences("See e.g. PEP 8. It’s long (cf. Fig. 2). Really? Yes! “Quoted.” End") == [
        "See e.g. PEP 8.",
        "It’s long (cf. Fig. 2).",
        "Really?",
        "Yes!",
        "“Quoted.”",
        "End",
    ]
    assert split_sentences("Version 3.11 is out. Next, e.g. this.") == ["Version 3.11 is out.", "Next, e.g. this."]
    wrapped = "A line that is wrapped at some seventy characters, as in a text file of\nPython, goes on.\n- one\n- two"
    assert split_sentences(wrapped) == [wrapped.split("\n- ")[0].replace("\n", " "), "- one", "- two"]
    assert split_sentences("") == []


@pytest.mark.parametrize(
    "words",
    ["execute executes executed executing execution", "sort sorts sorted sorting", "class classes", "copy copies"],
)
def test_forms_of_a_word_share_a_stem(words: str) -> None:
    assert len({stem(word) for word in words.split()}) == 1


def test_different_words_keep_different_stems() -> None:
    words = "list tuple dict class instance module process thread string bytes c c++ object".split()
    assert len({stem(word) for word in words}) == len(words)
    assert terms("How do I use C++ in a Python class?") == ["c++", "python", "class"]


# Answers


def test_answers_quote_the_right_passage_with_its_mark() -> None:
    assert say(ask(SORTING, "How do I get a new list that is sorted?")).startswith("Use sorted() to get a new list.")
    assert say(ask(SORTING, "How do I get a new list that is sorted?")).endswith("[2]")
    assert say(ask([SORTING, GENERATORS], "What is a generator?")).startswith("A generator is a function")
    for part in say(ask(SORTING, "Why can’t tuples change?")).split(" [1]")[0].split(" ... "):
        assert part in SORTING[0].text


def test_answers_come_in_the_order_of_the_prompt() -> None:
    docs = Docs([Doc(1, "Lists can grow."), Doc(2, "Cats purr."), Doc(3, "Lists can be sorted, and lists can grow.")])
    answer = say(ask(docs, "What can lists do: grow, or be sorted?"))
    marks = [int(m) for m in answer.replace("]", "[").split("[")[1::2]]
    assert marks == sorted(marks)
    assert 2 not in marks


def test_limits_and_stop_strings() -> None:
    prompt = ask(SORTING, "How do I get a new sorted list?")
    whole = say(prompt)
    reader = ReaderBackend()
    for limit in (0, 1, 5, 200):
        result = reader.generate([GenerateRequest(prompt, max_tokens=limit)])[0]
        assert isinstance(result, Generation)
        assert reader.count_tokens(result.text) <= limit
        assert result.completion_tokens == reader.count_tokens(result.text)
        assert result.finish_reason == ("stop" if result.text and result.text[-1] in ".]" else "length")
    assert say(prompt, stop=("sorted",)) == whole[: whole.find("sorted")]
    assert isinstance(reader.generate([GenerateRequest(prompt, max_tokens=-1)])[0], InputError)


def test_streams_by_words_and_can_be_cancelled() -> None:
    reader = ReaderBackend()
    prompts = [GenerateRequest(ask(SORTING, "How do I sort?")), GenerateRequest(ask(GENERATORS, "What is yield?"))]
    said: dict[int, list[str]] = {0: [], 1: []}
    results = reader.generate(prompts, lambda i, piece: said[i].append(piece), lambda i: i == 0 and len(said[0]) >= 2)
    assert isinstance(results[0], Generation)
    assert isinstance(results[1], Generation)
    assert results[0].finish_reason == "cancelled"
    assert results[0].text == "".join(said[0])
    assert len(said[0]) == 2
    assert results[1].text == "".join(said[1]) == say(prompts[1].prompt)
    assert len(said[1]) == len(results[1].text.split())


def test_is_deterministic_and_independent_of_the_batch() -> None:
    prompts = [ask(SORTING, "How do I sort?"), ask(GENERATORS, "What is yield?"), "Hello", "", "Split: a?"]
    alone = [say(p) for p in prompts]
    shuffled = [3, 1, 4, 0, 2, 1]
    together = ReaderBackend().generate([GenerateRequest(prompts[i], temperature=1.0, seed=i) for i in shuffled])
    assert [r.text for r in together if isinstance(r, Generation)] == [alone[i] for i in shuffled]


def test_an_earlier_answer_can_be_the_context_and_keeps_its_marks() -> None:
    facts = "Tuples are immutable sequences of items. [2]\n\nLists are sequences that can be changed in place. [1]"
    prompt = f"You answer from the facts, and about sequences from nothing else.\n\nTask: Context:\n{facts}\n\n"
    answer = say(prompt + "Question: Which sequences can be changed?\nANSWER:")
    assert answer == "Lists are sequences that can be changed in place. [1]"


# Other prompts


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Write a passage that answers: How does Python manage memory?", "Python manage memory."),
        ("Write a passage that answers: Why must dictionary keys be immutable?", "Dictionary keys be immutable."),
        ("Write one search query for: How do I sort a list?", "sort list"),
        ("Rewrite as a search query.\nQuestion: How can I call C++ from Python?\nQuery:", "call C++ Python"),
        ("Hello", "Hello."),
        ("", ""),
    ],
)
def test_without_a_context_it_restates_the_question(prompt: str, answer: str) -> None:
    assert say(prompt) == answer


@pytest.mark.parametrize(
    ("question", "parts"),
    [
        ("What is a generator?", ["What is a generator?"]),
        (
            "What is a generator and how does it differ from a list?",
            ["What is a generator?", "How does it differ from a list?"],
        ),
        ("What is the GIL, and why does it exist?", ["What is the GIL?", "Why does it exist?"]),
        ("How do I read and write files?", ["How do I read and write files?"]),
        ("What is a list? When is it copied?", ["What is a list?", "When is it copied?"]),
        (
            "What is the difference between lists and tuples?",
            ["What is lists?", "What is tuples?", "What is the difference between lists and tuples?"],
        ),
    ],
)
def test_compound_questions_are_split_one_a_line(question: str, parts: list[str]) -> None:
    assert split_question(question) == parts
    assert say(f"Split into simple questions, one a line:\n{question}").splitlines() == parts


def test_summaries_and_bare_paragraphs() -> None:
    assert "[1]" in say(f"Summarise the following passages:\n{SORTING}")
    prompt = (
        "Paris is the capital of France, and it lies on the Seine river.\n\n"
        "Berlin is the capital of Germany and its largest city.\n\nWhat is the capital of Germany?"
    )
    assert say(prompt) == "Berlin is the capital of Germany and its largest city."


# Choice


@pytest.mark.parametrize(
    ("prompt", "is_yes"),
    [
        (f"Context:\n{SORTING}\n\nDoes the context support this answer? Tuples are immutable. [1]", True),
        (f"Context:\n{SORTING}\n\nDoes the context support this answer? Pandas eat bamboo in China.", False),
        (f"Context:\n{SORTING}\n\nQuestion: How?\nAnswer: Use sorted() to get a new list.\nIs it supported?", True),
        (f"Context:\n{SORTING}\n\nQuestion: How?\nDraft: Zebras gallop over the plain.\nIs the draft good?", False),
        ("Does the context support this answer? Tuples are immutable. [1]", True),
        ("Does the context support this answer? Tuples are immutable.", False),
        (f"Context:\n{SORTING}\n\nQuestion: Can the elements of a tuple be replaced?\nAnswer:", True),
        (f"Context:\n{SORTING}\n\nQuestion: How do volcanoes erupt?\nAnswer:", False),
        ("Is it so?", False),
    ],
)
def test_yes_or_no(prompt: str, is_yes: bool) -> None:
    assert pick(prompt, "yes", "no") == (0 if is_yes else 1)
    assert pick(prompt, " No", " Yes") == (1 if is_yes else 0)
    assert say(prompt + "\nAnswer yes or no.") == ("yes" if is_yes else "no")


def test_other_choices_follow_the_context() -> None:
    prompt = ask(SORTING, "What gives a new list?")
    assert pick(prompt, "sorted()", "a tuple", "a generator") == 0
    assert pick(prompt, "a generator", "a tuple", "sorted()") == 2
    assert pick("Route to sql, web or docs: where are the docs of sorted?", "sql", "web", "docs") == 2
    assert pick("Nothing in common", "x1", "x2") == 0
    assert isinstance(pick("Which?"), InputError)


def test_support_is_a_share() -> None:
    passages = [Passage("[1]", "", "Tuples are immutable."), Passage("[2]", "", "Lists are mutable.")]
    assert support("Tuples are immutable. [1]", passages) == 1.0
    assert support("Zebras gallop.", passages) == 0.0
    assert 0 < support("Tuples gallop.", passages) < 1
    idf = inverse_frequencies([["a", "b"], ["a"]])
    assert idf["b"] > idf["a"] > 0
    assert coverage([], ["a"], idf, 1.0) == 0.0


# Bad weather


HOSTILE = [
    "[",
    "]",
    "-",
    ". ",
    " ",
    "\n",
    "a",
    "A: ",
    "[1] ",
    "\n[1] x",
    "? ",
    "answer ",
    "and what ",
    ":\n",
    "a=b ",
    "x, [1] ",
]


@pytest.mark.parametrize("junk", HOSTILE)
def test_hostile_prompts_take_linear_time(junk: str) -> None:
    text = junk * (20_000 // len(junk))
    start = time.process_time()
    for prompt in (
        text,
        ask(f"[1] T: {text}", "What is a?"),
        f"Split questions: {text}",
        f"Is this answer good? {text}",
    ):
        say(prompt)
        pick(prompt, "yes", "no")
    assert time.process_time() - start < 10  # a quadratic pattern takes minutes here


# How good it is


def top_passages(passages: list[dict[str, Any]], questions: list[str], k: int) -> list[list[int]]:
    """Positions of the `k` best passages for every question by plain BM25, best first."""
    postings: dict[str, list[tuple[int, int]]] = defaultdict(list)
    lengths = []
    for i, row in enumerate(passages):
        counts = Counter(terms(f"{row['title']} {row['text']}"))
        lengths.append(sum(counts.values()))
        for term, n in counts.items():
            postings[term].append((i, n))
    mean = sum(lengths) / len(lengths)
    out = []
    for question in questions:
        scores: Counter[int] = Counter()
        for term in set(terms(question)):
            found = postings.get(term, [])
            idf = math.log(1 + (len(passages) - len(found) + 0.5) / (len(found) + 0.5))
            for i, n in found:
                scores[i] += idf * n * 2.2 / (n + 1.2 * (0.25 + 0.75 * lengths[i] / mean))  # type: ignore[assignment]
        out.append(sorted(scores, key=lambda i: (-scores[i], i))[:k])
    return out


def test_quality_on_the_python_faq(root: Path) -> None:
    """The share of FAQ questions whose answer quotes a relevant passage, where BM25's four best hold at least one.

    Measured: 60 questions asked, 0.72 quote a relevant passage; always quoting the first passage would give 0.52.
    """
    folder = root / "data" / "pydocs"
    with gzip.open(folder / "passages.jsonl.gz", "rt", encoding="utf-8") as lines:
        passages = [json.loads(line) for line in lines]
    with gzip.open(folder / "queries.jsonl.gz", "rt", encoding="utf-8") as lines:
        queries = [q for q in map(json.loads, lines) if q["kind"] == "faq"]
    retrieved = top_passages(passages, [q["text"] for q in queries], 4)
    asked = quoted = first = sourced = 0
    for query, top in zip(queries, retrieved, strict=True):
        relevant = {rank for rank, i in enumerate(top, 1) if passages[i]["id"] in query["relevant"]}
        if not relevant:
            continue
        docs = Docs(Doc(passages[i]["id"], passages[i]["text"], 0.0, "", passages[i]["title"]) for i in top)
        answer = say(ask(docs, query["text"]), max_tokens=128)
        marks = {int(mark) for mark in answer.replace("]", "[").split("[") if mark.isdigit()}
        asked += 1
        first += 1 in relevant
        quoted += bool(marks & relevant)
        sourced += bool(marks)
    assert asked >= 40
    assert quoted / asked >= 0.65
    assert quoted > first, "the words of the question should find more than the retriever's order alone"
    assert sourced >= 0.95 * asked


def test_a_context_may_speak_of_keywords() -> None:
    fact = "To check whether a single key is in the dictionary, use the in keyword. [1]"
    text = say(f"Context:\n{fact}\n\nQuestion: How do I check for a key in a dictionary?\nAnswer:")
    assert "use the in keyword" in text
