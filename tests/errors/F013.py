"""F013: a statement around operations that has no form in a graph."""

FAILING = """
from flowc import LLM, workflow
llm = LLM()

@workflow
def main(path: str, question: str) -> str:
    with open(path) as file:
        answer = llm.generate(file.read() + question)
    return answer
"""
AT = "with open(path) as file:"
REPAIRED = """
from flowc import LLM, workflow
llm = LLM()

def read(path):
    with open(path) as file:
        return file.read()

@workflow
def main(path: str, question: str) -> str:
    text = read(path)
    return llm.generate(f"{text}{question}")
"""
CALL = ("/dev/null", "what?")
MORE = [
    (
        """
from flowc import LLM, workflow
llm = LLM()

@workflow
def main(question: str) -> str:
    try:
        answer = llm.generate(question)
    finally:
        return "done"
""",
        "try:",
    ),
    (
        """
from flowc import LLM, workflow
llm = LLM()

@workflow
def main(question: str) -> str:
    match question:
        case "":
            return "nothing"
        case other:
            return llm.generate(other)
""",
        "match question:",
    ),
    (
        """
from flowc import LLM, workflow
llm = LLM()

@workflow
def main(box: dict):
    box["n"] += llm.generate("x")
    return box
""",
        'box["n"] += llm.generate("x")',
    ),
]
