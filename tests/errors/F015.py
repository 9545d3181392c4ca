"""F015: a nested function that holds on to a variable which is bound again."""

FAILING = """
from flowc import workflow

@workflow
def main(n: int) -> int:
    add = lambda x: x + n
    n = 5
    return add(n)
"""
AT = "lambda x: x + n"
REPAIRED = """
from flowc import workflow

@workflow
def main(n: int) -> int:
    add = lambda x, n=n: x + n
    n = 5
    return add(n)
"""
CALL = (1,)
MORE = [
    (
        """
from flowc import workflow

@workflow
def main(n: int) -> int:
    total = 0
    def add(x):
        nonlocal total
        total += x
    add(n)
    return total
""",
        "nonlocal total",
    ),
]
