"""ITER-RETGEN: each round searches with the last answer, for what an answer names is nearer to its sources than the
question is (Shao et al., 2023). The number of rounds is fixed, so the whole run is known before it begins."""

from flowc import LLM, Index, workflow

docs = Index("pydocs")
llm = LLM("default")


@workflow
def iter_retgen(question: str) -> str:
    answer = ""
    for _ in range(3):
        passages = docs.search(f"{question} {answer}", k=4)
        answer = llm.generate(f"Context:\n{passages}\n\nQuestion: {question}\nAnswer:", max_tokens=64)
    return answer


if __name__ == "__main__":
    print(iter_retgen("Why does my generator run out after one loop?"))
