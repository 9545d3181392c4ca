"""F011: the source of the workflow cannot be found."""

FAILING = """
from flowc import workflow
text = "def made(x: str) -> str:\\n    return x.upper()\\n"
namespace = {}
exec(text, namespace)
main = workflow(namespace["made"])
"""
AT = ""  # there is no line to show
REPAIRED = """
from flowc import workflow

@workflow
def main(x: str) -> str:
    return x.upper()
"""
CALL = ("a",)
