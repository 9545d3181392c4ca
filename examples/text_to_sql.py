"""Text to SQL with repair: a query that the database refuses goes back to the model with the error."""

import sqlite3

from flowc import LLM, Agent, tool, workflow

llm = LLM("default")

SCHEMA = "CREATE TABLE modules (name TEXT, added TEXT, topic TEXT, lines INTEGER)"
ROWS = [
    ("json", "2.6", "data", 900),
    ("asyncio", "3.4", "concurrency", 12000),
    ("dataclasses", "3.7", "classes", 1500),
    ("tomllib", "3.11", "data", 1000),
    ("zoneinfo", "3.9", "dates", 800),
]
FALLBACK = "SELECT name, topic FROM modules ORDER BY name"
writer = Agent("sql", llm, system=f"You write one SQLite query. The schema: {SCHEMA}", max_tokens=48)


@tool(reads=("db",), idempotent=True)
def query(sql: str) -> str:
    """The rows of a query over the modules, one a line; sqlite3.Error if the database refuses it."""
    db = sqlite3.connect(":memory:")
    try:
        db.execute(SCHEMA)
        db.executemany("INSERT INTO modules VALUES (?, ?, ?, ?)", ROWS)
        return "\n".join(", ".join(map(str, row)) for row in db.execute(sql))
    finally:
        db.close()


@workflow
def text_to_sql(question: str) -> str:
    sql = writer(f"Question: {question}")
    for _ in range(2):
        try:
            return f"{sql.strip()}\n{query(sql)}"
        except sqlite3.Error as error:
            sql = writer(f"Question: {question}\nThis failed: {sql}\nThe error: {error}")
    return f"{FALLBACK}\n{query(FALLBACK)}"


if __name__ == "__main__":
    print(text_to_sql("Which modules about data came after 3.0?"))
