"""A troubleshooting guide as a program: the checks of its decision graph, each branch with a search of its own.

Which branch it will be is not known before the model has chosen; what both need is fetched meanwhile."""

from flowc import LLM, Index, workflow

docs = Index("pydocs")
llm = LLM("default")

KINDS = ("import", "performance", "concurrency", "other")


@workflow
def troubleshooting(question: str) -> str:
    general = docs.search(question, k=2)
    kind = llm.choose(f"Problem: {question}\nWhat is it about?", KINDS)
    if kind == "import":
        special = docs.search(f"module search path {question}", k=2)
        advice = llm.generate(f"Context:\n{special}\n\nQuestion: Where does {question} look?\nAnswer:", max_tokens=32)
    elif kind == "performance":
        special = docs.search(f"profile time {question}", k=2)
        slow = llm.choose(f"Context:\n{special}\nIs the time spent in Python or in waiting?", ["python", "waiting"])
        advice = llm.generate(f"Context:\n{special}\n\nQuestion: What if it is {slow}?\nAnswer:", max_tokens=32)
    elif kind == "concurrency":
        special = docs.search(f"threads locks {question}", k=2)
        advice = llm.generate(f"Context:\n{special}\n\nQuestion: Which lock for {question}?\nAnswer:", max_tokens=32)
    else:
        advice = "No special guide applies."
    return llm.generate(f"Context:\n{general}\n{advice}\n\nQuestion: {question}\nAnswer:", max_tokens=64)


if __name__ == "__main__":
    print(troubleshooting("My program hangs when I join a process that wrote much to a queue."))
