"""F017: an argument that the graph would have to hold, and cannot."""

FAILING = """
from flowc import workflow

class Style:
    pass

@workflow
def inner(text: str, style=Style()) -> str:
    return f"{text} {type(style).__name__}"

@workflow
def main(text: str) -> str:
    return inner(text)
"""
AT = "inner(text)"
REPAIRED = """
from flowc import workflow

class Style:
    pass

STYLE = Style()

@workflow
def inner(text: str, style=STYLE) -> str:
    return f"{text} {type(style).__name__}"

@workflow
def main(text: str) -> str:
    return inner(text, STYLE)
"""
CALL = ("a",)
MORE = [
    (
        """
from flowc import LLM, workflow
llm = LLM()

def schema_for(t):
    return dict

@workflow
def main(text: str):
    return llm.parse(text, schema_for(text))
""",
        "schema_for(text)",
    ),
]
