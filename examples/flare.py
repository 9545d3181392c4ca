"""FLARE: write sentence by sentence; one that the model is not sure of is searched for and written again with what was
found (Jiang et al., 2023)."""

from flowc import LLM, Index, workflow

docs = Index("pydocs")
llm = LLM("default")


@workflow
def flare(question: str) -> str:
    passages = docs.search(question, k=3)
    written = ""
    for _ in range(3):
        prompt = f"Context:\n{passages}\n\nQuestion: {question}\nAnswer: {written}"
        sentence = llm.generate(prompt, max_tokens=24, stop=("\n",))
        if llm.choose(f"{prompt}{sentence}\nIs the last sentence certain?", ["yes", "no"]) == "no":
            passages = docs.search(sentence or question, k=3)
            sentence = llm.generate(
                f"Context:\n{passages}\n\nQuestion: {question}\nAnswer: {written}", max_tokens=24, stop=("\n",)
            )
        written += f"{sentence} "
    return written


if __name__ == "__main__":
    print(flare("What happens when two threads append to the same list?"))
