"""F014: a generator expression or a special comprehension with operations."""

FAILING = """
from flowc import LLM, workflow
llm = LLM()

def first(items):
    return next(iter(items))

@workflow
def main(names: list[str]) -> str:
    return first(llm.generate(name) for name in names)
"""
AT = "(llm.generate(name) for name in names)"
REPAIRED = """
from flowc import LLM, workflow
llm = LLM()

def first(items):
    return next(iter(items))

@workflow
def main(names: list[str]) -> str:
    return first([llm.generate(name) for name in names])
"""
CALL = (["a", "b"],)
MORE = [
    (
        """
from flowc import LLM, workflow
llm = LLM()

@workflow
def main(names: list[str]) -> list[str]:
    return [y for name in names if (y := llm.generate(name))]
""",
        "[y for name in names if (y := llm.generate(name))]",
    ),
    (
        """
from flowc import LLM, workflow
llm = LLM()

@workflow
def main(names: list[str]) -> bool:
    return any(llm.generate(a + b) for a in names for b in names)
""",
        "(llm.generate(a + b) for a in names for b in names)",
    ),
]
