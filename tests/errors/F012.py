"""F012: a workflow that is a generator."""

FAILING = """
from flowc import LLM, workflow
llm = LLM()

@workflow
def main(question: str):
    for line in llm.generate(question).splitlines():
        yield line
"""
AT = "yield line"
REPAIRED = """
from flowc import LLM, workflow
llm = LLM()

@workflow
def main(question: str) -> list[str]:
    return [line for line in llm.generate(question).splitlines()]
"""
CALL = ("what?",)
MORE = [
    (
        """
from flowc import LLM, workflow
llm = LLM()

@workflow
async def main(question: str):
    yield await llm.generate(question)
""",
        "yield await llm.generate(question)",
    ),
]
