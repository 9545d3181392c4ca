"""Four analysts at the same time, one chair: they share the passages as a prefix, which is computed once."""

from flowc import LLM, Index, workflow

docs = Index("pydocs")
llm = LLM("default")

VIEWS = ("correctness", "speed", "readability", "safety")


@workflow
def fan_in(question: str) -> str:
    context = f"Context:\n{docs.search(question, k=4)}\n\nQuestion: {question}\n"
    reports = [llm.generate(f"{context}Report on {view} only.\nAnswer:", max_tokens=48) for view in VIEWS]
    joined = "\n".join(f"{view}: {report}" for view, report in zip(VIEWS, reports, strict=True))
    return llm.generate(f"Context:\n{joined}\n\nQuestion: {question}\nAnswer:", max_tokens=64)


if __name__ == "__main__":
    print(fan_in("Should I build a long string with += or with join?"))
