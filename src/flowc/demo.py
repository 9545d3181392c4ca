"""`flowc demo`: the index of the bundled documents, a few answers with their sources, and the plan as a picture.

The passages are the Python documentation (data/pydocs, PSF-2.0). Their embeddings are shipped, so that building the index
takes seconds; questions are embedded live. Answers come from the bundled extractive reader, which copies sentences: it is
no language model. Put `[llm.default]` into flowc.toml to answer with one.
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

from flowc import LLM, Index, build_index, open_index, workflow
from flowc.backends.embed import open_embedder
from flowc.backends.vector.documents import Passage
from flowc.ir.errors import ResourceError
from flowc.ir.values import Docs

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


def bundled_documents() -> Path:
    """The folder data/pydocs of a checkout. ResourceError if flowc runs from somewhere else."""
    for base in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (base / "data" / "pydocs" / "passages.jsonl.gz").exists():
            return base / "data" / "pydocs"
    raise ResourceError(
        "the bundled documents are not here",
        code="F061",
        hint="run the demo in a checkout of flowc (`make demo`), or index your own folder: flowc index build FOLDER -o .flowc/indexes/mine",
    )


def build_demo_index(folder: Path, out: Path = INDEX) -> int:
    """Builds the index of the bundled documents from their shipped embeddings; gives back the number of passages."""
    import numpy as np

    with gzip.open(folder / "passages.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    passages = [Passage(r["text"], title=r["title"], source=r["source"]) for r in rows]
    vectors = np.load(folder / "vectors.fp16.npy")
    build_index(passages, open_embedder("minilm"), out, kind="ivf", vectors=vectors)
    return len(passages)


def main() -> int:
    """Runs the demo; the exit code."""
    started = time.perf_counter()

    def say(text: str = "") -> None:
        print(text, flush=True)

    folder = bundled_documents()
    try:
        index: Any = open_index(INDEX, name="pydocs")
    except ResourceError:
        say(f"Building the index of the bundled documents ({folder.name}) ...")
        count = build_demo_index(folder)
        say(f"  {count} passages in {time.perf_counter() - started:.1f} s, kept in {INDEX}")
        index = open_index(INDEX, name="pydocs")
    bind(index={"pydocs": index})

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
