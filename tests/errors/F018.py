"""F018: a workflow that takes any number of arguments."""

FAILING = """
from flowc import workflow

@workflow
def main(*texts: str) -> str:
    return "".join(texts)
"""
AT = "texts: str"
REPAIRED = """
from flowc import workflow

@workflow
def main(texts: list[str]) -> str:
    return "".join(texts)
"""
CALL = (["a", "b"],)
MORE = [
    (
        """
from flowc import workflow

@workflow
def main(text: str, **options: str) -> str:
    return text
""",
        "options: str",
    ),
]
