"""Sub-questions: split, search and answer every part at the same time, then answer the whole from the parts."""

from flowc import LLM, Index, workflow

docs = Index("pydocs")
llm = LLM("default")


@workflow
def answer_part(question: str) -> str:
    passages = docs.search(question, k=3)
    return llm.generate(f"Context:\n{passages}\n\nQuestion: {question}\nAnswer:", max_tokens=64)


@workflow
def sub_questions(question: str) -> str:
    parts = llm.generate(f"Split into simple questions, one a line:\n{question}", max_tokens=64).splitlines()
    notes = [answer_part(part) for part in parts[:4] if part.strip()]
    context = "\n\n".join(notes)
    return llm.generate(f"Context:\n{context}\n\nQuestion: {question}\nAnswer:", max_tokens=128)


if __name__ == "__main__":
    print(sub_questions("How do I copy a list, and what is the difference between a list and a tuple?"))
