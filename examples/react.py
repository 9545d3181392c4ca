"""ReAct: reason, call a tool, observe, go on (Yao et al., 2023). The loop is the agent's; it lowers to ordinary IR."""

import ast
import operator

from flowc import LLM, Agent, Index, tool, workflow

docs = Index("pydocs")
llm = LLM("default")

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


@tool(reads=("calculator",), idempotent=True)
def calculate(expression: str) -> str:
    """The value of an arithmetic expression of numbers, + - * / and brackets."""

    def value(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.BinOp():
                return float(OPERATORS[type(node.op)](value(node.left), value(node.right)))
            case _:
                raise ValueError(f"not arithmetic: {ast.unparse(node)}")

    return str(value(ast.parse(expression, mode="eval").body))


solver = Agent("solver", llm, system="You solve problems step by step.", tools=[calculate], max_turns=4, max_tokens=48)


@workflow
def react(question: str) -> str:
    return solver(f"Context:\n{docs.search(question, k=3)}\n\nQuestion: {question}")


if __name__ == "__main__":
    print(react("How many bytes does an int take, and how many do a million of them?"))
