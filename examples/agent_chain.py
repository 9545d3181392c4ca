"""Ten agents in a row, each with a fixed role: what KVFlow calls a sequential workflow (Pan et al., 2025).

Every role's prompt is known before the run, and so is who comes next: the compiler keeps each role's KV cache until its
turn, and has it back from the host just before."""

from flowc import LLM, Agent, Index, workflow

docs = Index("pydocs")
llm = LLM("default")

ROLES = {
    "reader": "You list the facts of the context that bear on the question.",
    "sceptic": "You name what in the facts is doubtful, and keep the rest.",
    "historian": "You say which version of the language the facts are about.",
    "teacher": "You explain the facts to somebody who knows another language.",
    "coder": "You write the shortest program that shows the facts at work.",
    "tester": "You say what the program prints, line by line.",
    "critic": "You say what is missing for a complete answer.",
    "writer": "You write the answer from all that was said.",
    "editor": "You shorten a text and keep its meaning.",
    "publisher": "You give the text a title and leave the rest as it is.",
}
reader, sceptic, historian, teacher, coder, tester, critic, writer, editor, publisher = (
    Agent(name, llm, system=f"{role} You are careful, brief and never invent anything.", max_tokens=32)
    for name, role in ROLES.items()
)


@workflow
def agent_chain(question: str) -> str:
    asked = f"Question: {question}"
    facts = reader(f"Context:\n{docs.search(question, k=3)}\n\n{asked}")
    sound = sceptic(f"Context:\n{facts}\n\n{asked}")
    lesson = teacher(f"Context:\n{sound}\n\n{asked}")
    version = historian(f"Context:\n{sound}\n\n{asked}")
    program = coder(f"Context:\n{lesson}\n{version}\n\n{asked}")
    shown = tester(f"Context:\n{program}\n\n{asked}")
    gaps = critic(f"Context:\n{lesson}\n{program}\n{shown}\n\n{asked}")
    text = writer(f"Context:\n{lesson}\n{program}\n{shown}\n{gaps}\n\n{asked}")
    short = editor(f"Context:\n{text}\n\n{asked}")
    return publisher(f"Context:\n{short}\n\n{asked}")


if __name__ == "__main__":
    print(agent_chain("What is a context manager good for?"))
