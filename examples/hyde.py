"""HyDE: search with a passage that might answer the question, not with the question (Gao et al., 2023)."""

from flowc import LLM, Index, workflow

docs = Index("pydocs")
llm = LLM("default")


@workflow
def hyde(question: str) -> str:
    hypothetical = llm.generate(f"Write a short passage that answers: {question}", max_tokens=64)
    passages = docs.search(f"{question} {hypothetical}", k=4)
    return llm.generate(f"Context:\n{passages}\n\nQuestion: {question}\nAnswer:", max_tokens=96)


if __name__ == "__main__":
    for piece in hyde.stream("What does the global interpreter lock protect?"):
        print(piece, end="", flush=True)
    print()
