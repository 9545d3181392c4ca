"""`flowc demo`: the index of the bundled documents, a few answers with their sources, and the plan as a picture.

The passages are the Python documentation (data/pydocs, PSF-2.0). Their embeddings are shipped, so that building the
index takes seconds; questions are embedded live. Answers come from the bundled extractive reader, which copies
sentences: it is no language model. Put `[llm.default]` into flowc.toml to answer with one.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from flowc import LLM, Docs, Index, open_index, workflow
from flowc.backends.vector.bundle import index_bundle

from .engine import INDEXES, bind
from .pictures.html import page_of

QUESTIONS = (
    "How do I sort a dictionary by its values?",
    "Why are Python strings immutable?",
    "What does the global interpreter lock protect?",
    "How do I make a deep copy of an object?",
)
INDEX = INDEXES / "pydocs"

docs = Index("pydocs")
llm = LLM("default")


@workflow
def answer(question: str) -> tuple[str, Docs]:
    """The workflow of the demo: search twice, read, answer."""
    passages = docs.search(question, k=4)
    keywords = llm.generate(f"Context:\n{passages}\n\nQuestion: Which terms matter for: {question}", max_tokens=24)
    more = docs.search(f"{question} {keywords}", k=2)
    text = llm.generate(f"Context:\n{passages + more}\n\nQuestion: {question}\nAnswer:", max_tokens=96)
    return text, passages + more


def main() -> int:
    """Runs the demo; the exit code."""
    started = time.perf_counter()

    def say(text: str = "") -> None:
        print(text, flush=True)

    if not (INDEX / "manifest.json").exists():
        say("Building the index of the bundled documents ...")
        built = index_bundle("pydocs", INDEX, kind="ivf")
        say(f"  {built.count} passages in {time.perf_counter() - started:.1f} s, kept in {INDEX}")
    bind(index={"pydocs": open_index(INDEX, name="pydocs")})

    plan = answer.compile()
    began = time.perf_counter()
    results = plan.map(QUESTIONS, progress=False)
    spent = time.perf_counter() - began
    for question, result in zip(QUESTIONS, results, strict=True):
        if isinstance(result, BaseException):
            say(f"\nQ: {question}\n   failed: {result}")
            continue
        text, passages = result
        say(f"\nQ: {question}\nA: {text}")
        for source in dict.fromkeys(f"{d.title} ({d.source})" for d in passages[:3]):
            say(f"   - {source}")
    results.raise_errors()
    say(f"\n{len(QUESTIONS)} programs side by side in {spent:.1f} s, loading the embedder included.")

    page = Path("out") / "demo" / "answer.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(page_of(plan.compilation), encoding="utf-8", errors="backslashreplace")
    say("The answers are sentences copied by the bundled extractive reader; it is not a language model.")
    say(f"The plan, before and after: {page}")
    say(f"Done in {time.perf_counter() - started:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
