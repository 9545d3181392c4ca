"""Self-RAG: is a search needed, which passages are relevant, which answer do they support (Asai et al., 2024).

Relevance, answers and support are asked of every passage at the same time; each choice is scored in one prefill."""

from flowc import LLM, Index, workflow

docs = Index("pydocs")
llm = LLM("default")


@workflow
def self_rag(question: str) -> str:
    if llm.choose(f"Question: {question}\nDoes answering it need the documentation?", ["yes", "no"]) == "no":
        return llm.generate(f"Context:\n{question}\n\nQuestion: {question}\nAnswer:", max_tokens=64)
    passages = docs.search(question, k=3)
    supported, others = [], []
    for passage in passages:
        about = f"Context:\n{passage}\n\nQuestion: {question}\n"
        relevance = llm.choose(f"{about}Is the context relevant?", ["yes", "no"])
        answer = llm.generate(f"{about}Answer:", max_tokens=48)
        support = llm.choose(f"{about}Answer: {answer}\nIs it supported?", ["fully", "partly", "not"])
        if relevance == "yes" and support != "not":
            supported.append(answer)
        else:
            others.append(answer)
    return "\n".join(supported or others)


if __name__ == "__main__":
    print(self_rag("Is a tuple faster than a list?"))
