"""Iterative RAG with a judge: look again with what is known so far, until the answer stands on what was found."""

from flowc import LLM, Index, workflow

docs = Index("pydocs")
llm = LLM("default")


@workflow
def iterative(question: str) -> str:
    passages = docs.search(question, k=3)
    draft = llm.generate(f"Context:\n{passages}\n\nQuestion: {question}\nAnswer:", max_tokens=96)
    for _ in range(3):
        verdict = llm.choose(f"Context:\n{passages}\n\nAnswer: {draft}\nDoes the context support it?", ["yes", "no"])
        if verdict == "yes":
            break
        passages = docs.search(f"{question} {draft}", k=4)
        draft = llm.generate(f"Context:\n{passages}\n\nQuestion: {question}\nAnswer:", max_tokens=96)
    return draft


if __name__ == "__main__":
    questions = ["Why are Python strings immutable?", "How do I keep a generator from running out?"]
    for question, text in zip(questions, iterative.map(questions), strict=True):
        print(f"{question}\n  {text}")
