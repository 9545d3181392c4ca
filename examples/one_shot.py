"""One-shot RAG: look it up once, answer from what was found, name the sources."""

from flowc import LLM, Index, workflow

docs = Index("pydocs")
llm = LLM("default")


@workflow
def answer(question: str) -> str:
    passages = docs.search(question, k=4)
    text = llm.generate(f"Context:\n{passages}\n\nQuestion: {question}\nAnswer:", max_tokens=96)
    return f"{text}\nSources: {', '.join(dict.fromkeys(passages.sources))}"


if __name__ == "__main__":
    print(answer("How do I sort a dictionary by its values?"))
