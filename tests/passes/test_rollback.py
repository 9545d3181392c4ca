"""Work that a pass has begun on a guess: taken where the guess is right, dropped and done anew where it is wrong."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from flowc.ir.parser import parse_graph
from flowc.ir.values import Doc, Docs
from flowc.passes import PassManager, parse_pipeline, pipeline
from flowc.passes.core import Pass
from flowc.runtime.engine import Runtime
from flowc.runtime.plan import build_plan
from flowc.runtime.protocols import ChooseRequest, GenerateRequest, Generation, SearchRequest

UNITS = 4


class Search:
    def __init__(self, request: SearchRequest) -> None:
        self.request, self.ran, self.units = request, 0, UNITS

    @property
    def done(self) -> bool:
        return self.ran >= self.units

    def cancel(self) -> None:
        self.ran = self.units


class World:
    """A model, and an index whose searches show from the first step on what they find, or something else.

    With `waits` a search goes on only once somebody has asked the model.
    """

    name, kind, max_batch = "world", "scripted", 8

    def __init__(self, shows: str, choice: int = 0, *, waits: bool = False) -> None:
        self.shows, self.choice = shows, choice
        self.asked = threading.Event()
        if not waits:
            self.asked.set()
        self.prompts: list[str] = []
        self.queries: list[str] = []

    def llm(self, name: str) -> Any:
        return self

    index = embedder = reranker = llm

    def batch_key(self, request: object) -> str:
        return type(request).__name__

    def generate(self, requests: Sequence[GenerateRequest], *_: object) -> list[Generation]:
        self.prompts += [r.prompt for r in requests]
        self.asked.set()
        return [Generation(f"<{r.prompt}>") for r in requests]

    def choose(self, requests: Sequence[ChooseRequest]) -> list[int]:
        return [self.choice] * len(requests)

    def search(self, requests: Sequence[SearchRequest]) -> list[Docs]:
        self.queries += [r.query for r in requests]
        return [Docs([Doc(1, "found")]) for _ in requests]

    def begin(self, requests: Sequence[SearchRequest]) -> list[Search]:
        self.queries += [r.query for r in requests]
        return [Search(r) for r in requests]

    def scan(self, searches: Sequence[Search], budget: Any = None) -> None:
        for search in searches:
            assert not search.ran or self.asked.wait(20)
            search.ran += 1

    def confidence(self, search: Search) -> float:
        return 1.0

    def partial(self, search: Search) -> Docs:
        return Docs([Doc(1, "found" if search.done else self.shows)])

    def finish(self, search: Search) -> Docs:
        return Docs([Doc(1, "found")])

    def count_tokens(self, text: str) -> int:
        return len(text)

    def close(self) -> None: ...


def run(text: str, passes: list[Pass], world: World) -> Any:
    graph = PassManager(passes, verify_each=True).run(parse_graph(text)).graph
    with Runtime(world) as runtime:
        return runtime.run(build_plan(graph), ("q",))


ANSWER = """
workflow @w(%q: text) -> text {
  %docs = search @docs (%q) {k = 1} : docs
  %prompt = template "{}: {}" (%q, %docs) : text
  %answer = generate @llm (%prompt) {max_tokens = 8} : text
  return %answer
}
"""


@pytest.mark.parametrize(("shows", "prompts"), [("found", 1), ("a wrong guess", 2)])
def test_a_generation_from_a_partial_result(shows: str, prompts: int) -> None:
    world = World(shows, waits=True)
    answer = run(ANSWER, pipeline(3), world)
    assert answer == run(ANSWER, [], World(shows))
    assert len(world.prompts) == prompts
    assert ("wrong" in world.prompts[0]) == (prompts == 2), "the guess is asked first"


BRANCH = """
workflow @w(%q: text) -> text seq {
  %options = py "['yes', 'no']" : list<text>
  %choice = choose @llm (%q, %options) : text
  %test = equals "no" (%choice) : bool
  %r = if (%test) : text then seq {
    %docs = search @docs (%q) {k = 1} : docs
    %found = template "{}" (%docs) : text
    yield %found
  } else seq {
    yield %q
  }
  return %r
}
"""


@pytest.mark.parametrize("choice", [0, 1])
def test_a_search_ahead_of_its_branch(choice: int) -> None:
    world = World("found", choice)
    assert run(BRANCH, parse_pipeline("hoist"), world) == run(BRANCH, [], World("found", choice))
    assert len(world.queries) == 1 or (choice == 0 and not world.queries), "once; and if nobody needs it, perhaps never"


OTHER = """
workflow @w(%q: text) -> text {
  %other = template "not {}" (%q) : text
  %early = ahead.search @docs (%other) {k = 1} : ahead
  %docs = search @docs (%q, ahead=%early) {k = 1} : docs
  %found = template "{}" (%docs) : text
  return %found
}
"""


def test_a_search_for_something_else_is_done_anew() -> None:
    world = World("found")
    assert run(OTHER, pipeline(3), world) == run(OTHER, [], World("found"))
    assert world.queries[-1] == "q"
