"""Map-reduce over documents: a note on each, then pairs of notes merged until one is left.

Notes are written at the same time, and so are the merges of one round."""

from flowc import LLM, Index, workflow

docs = Index("pydocs")
llm = LLM("default")


@workflow
def map_reduce(question: str) -> str:
    passages = docs.search(question, k=8)
    notes = [llm.generate(f"Context:\n{p}\n\nQuestion: {question}\nAnswer:", max_tokens=32) for p in passages]
    while len(notes) > 1:
        pairs = ["\n".join(notes[i : i + 2]) for i in range(0, len(notes), 2)]
        notes = [llm.generate(f"Context:\n{pair}\n\nQuestion: {question}\nAnswer:", max_tokens=32) for pair in pairs]
    return notes[0]


if __name__ == "__main__":
    print(map_reduce("Which modules read and write compressed files?"))
