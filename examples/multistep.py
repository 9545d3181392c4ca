"""Multi-step questions: ask the next sub-question in the light of the answers so far (self-ask, Press et al., 2023)."""

from flowc import LLM, Index, workflow

docs = Index("pydocs")
llm = LLM("default")


@workflow
def multistep(question: str) -> str:
    known = ""
    for step in range(3):
        following = llm.generate(
            f"Question: {question}\nKnown so far:\n{known}\nSub-question {step + 1}, one line:", max_tokens=24
        )
        passages = docs.search(f"{question} {following}", k=3)
        found = llm.generate(f"Context:\n{passages}\n\nQuestion: {following}\nAnswer:", max_tokens=48)
        known += f"- {following.strip()}: {found}\n"
        if llm.choose(f"{known}\nIs this enough to answer: {question}?", ["yes", "no"]) == "yes":
            break
    return llm.generate(f"Context:\n{known}\n\nQuestion: {question}\nAnswer:", max_tokens=96)


if __name__ == "__main__":
    print(multistep("Which lock does the interpreter hold while a C extension runs, and how is it let go?"))
