"""Two debaters answer each other for two rounds, a judge decides (Du et al., 2024). Both speak at the same time."""

from flowc import LLM, Agent, Index, workflow

docs = Index("pydocs")
llm = LLM("default")

optimist = Agent("optimist", llm, system="You argue for the proposal, from the context alone.", max_tokens=48)
sceptic = Agent("sceptic", llm, system="You argue against the proposal, from the context alone.", max_tokens=48)


@workflow
def debate(question: str) -> str:
    context = f"Context:\n{docs.search(question, k=3)}"
    pro = con = ""
    for _ in range(2):
        said = f"{context}\nFor: {pro}\nAgainst: {con}\n\nQuestion: {question}"
        pro, con = optimist(said), sceptic(said)
    winner = llm.choose(f"{context}\nFor: {pro}\nAgainst: {con}\nWho is right?", ["for", "against"])
    return f"{winner}: {pro if winner == 'for' else con}"


if __name__ == "__main__":
    print(debate("Should a function have mutable default arguments?"))
