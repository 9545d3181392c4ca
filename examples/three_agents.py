"""Three agents in a chain: a researcher with a search tool's findings, a writer, an editor; each with a fixed role."""

from flowc import LLM, Agent, Index, workflow

docs = Index("pydocs")
llm = LLM("default")

researcher = Agent("researcher", llm, system="You pick the facts that matter out of the context.", max_tokens=128)
writer = Agent("writer", llm, system="You answer from the given facts, and from nothing else.", max_tokens=96)
editor = Agent("editor", llm, system="You shorten a text and keep its meaning.", max_tokens=64)


@workflow
def report(question: str) -> str:
    background = docs.search(question, k=4)
    examples = docs.search(f"example: {question}", k=2)
    facts = researcher(f"Context:\n{background}\n{examples}\n\nQuestion: {question}")
    draft = writer(f"Context:\n{facts}\n\nQuestion: {question}")
    return editor(f"Context:\n{draft}\n\nQuestion: {question}")


if __name__ == "__main__":
    print(report("What is a context manager good for?"))
