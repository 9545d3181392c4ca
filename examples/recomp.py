"""RECOMP: compress every passage to what the question needs before the answer is written (Xu et al., 2024).

The summaries are written at the same time; a passage that says nothing about the question is left out."""

from flowc import LLM, Index, workflow

docs = Index("pydocs")
llm = LLM("default")


@workflow
def recomp(question: str) -> str:
    passages = docs.search(question, k=4)
    notes = []
    for passage in passages:
        note = llm.generate(
            f"Context:\n{passage}\n\nQuestion: What here helps with: {question}\nAnswer:", max_tokens=32
        )
        if note.strip():
            notes.append(f"- {note.strip()}")
    summary = "\n".join(notes)
    return llm.generate(f"Context:\n{summary}\n\nQuestion: {question}\nAnswer:", max_tokens=64)


if __name__ == "__main__":
    print(recomp("How do I write a file so that a crash does not truncate it?"))
