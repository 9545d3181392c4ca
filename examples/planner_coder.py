"""Planner, coder, tester: the coder tries again with the tester's findings until the program compiles."""

from flowc import LLM, Agent, Index, tool, workflow

docs = Index("pydocs")
llm = LLM("default")

planner = Agent("planner", llm, system="You write a plan of three short steps.", max_tokens=48)
coder = Agent("coder", llm, system="You write one Python program, and nothing else.", max_tokens=64)


@tool(reads=("compiler",), idempotent=True)
def check(program: str) -> str:
    """What the compiler says of a program; empty if it accepts it."""
    try:
        compile(program, "<program>", "exec")
    except (SyntaxError, ValueError) as error:
        return str(error)
    return ""


@workflow
def planner_coder(question: str) -> str:
    passages = docs.search(question, k=3)
    plan = planner(f"Context:\n{passages}\n\nQuestion: {question}")
    program = coder(f"Context:\n{passages}\n{plan}\n\nQuestion: {question}")
    for _ in range(2):
        complaint = check(program)
        if not complaint:
            break
        program = coder(f"Context:\n{passages}\n{plan}\n{program}\n\nQuestion: {question} It fails with: {complaint}")
    return program


if __name__ == "__main__":
    print(planner_coder("How do I read a CSV file into dictionaries?"))
