"""Tree search over thoughts, in the manner of LATS (Zhou et al., 2024): expand, score, keep the best, go deeper.

A level's expansions run at the same time, and so do its scores; a thought's prompt begins with its parent's, so the
tree of thoughts is a tree of prefixes in the KV cache too."""

from flowc import LLM, Index, pure, workflow

docs = Index("pydocs")
llm = LLM("default")

HINTS = ("Think of the simplest way.", "Think of what can go wrong.", "Think of the standard library.")
GRADES = ("excellent", "good", "fair", "poor")


@pure
def best(thoughts: list[str], grades: list[str], width: int) -> list[str]:
    """The thoughts with the best grades; of equal grades the earlier."""
    order = sorted(range(len(thoughts)), key=lambda i: GRADES.index(grades[i]))
    return [thoughts[i] for i in order[:width]]


@workflow
def tree_search(question: str) -> str:
    frontier = [f"Context:\n{docs.search(question, k=2)}\n\nQuestion: {question}\n"]
    for _ in range(2):
        asked = [f"{path}{hint}\nAnswer:" for path in frontier for hint in HINTS]
        thoughts = [f"{prompt}{llm.generate(prompt, max_tokens=24)}\n" for prompt in asked]
        grades = [llm.choose(f"{thought}How good is the last thought?", GRADES) for thought in thoughts]
        frontier = best(thoughts, grades, 2)
    return llm.generate(f"{frontier[0]}In short.\nAnswer:", max_tokens=48)


if __name__ == "__main__":
    print(tree_search("How do I remove duplicates from a list and keep its order?"))
