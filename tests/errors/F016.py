"""F016: a coroutine or task that is used without being awaited, or a form of waiting that flowc does not know."""

FAILING = """
import asyncio
from flowc import LLM, workflow
llm = LLM()

@workflow
async def main(question: str) -> str:
    draft = llm.generate(question)
    return f"Draft: {draft}"
"""
AT = 'f"Draft: {draft}"'
REPAIRED = """
import asyncio
from flowc import LLM, workflow
llm = LLM()

@workflow
async def main(question: str) -> str:
    draft = await llm.generate(question)
    return f"Draft: {draft}"
"""
CALL = ("what?",)
MORE = [
    (
        """
import asyncio
from flowc import LLM, workflow
llm = LLM()

@workflow
async def main(question: str) -> list[str]:
    return await asyncio.gather(llm.generate(question), llm.generate("b"), return_exceptions=True)
""",
        'asyncio.gather(llm.generate(question), llm.generate("b"), return_exceptions=True)',
    ),
    (
        """
import asyncio
from flowc import LLM, workflow
llm = LLM()

@workflow
async def main(question: str) -> str:
    return await asyncio.wait_for(llm.generate(question), 3)
""",
        "await asyncio.wait_for(llm.generate(question), 3)",
    ),
    (
        """
import asyncio
from flowc import LLM, workflow
llm = LLM()

@workflow
async def main(question: str, c: bool) -> str:
    task = asyncio.create_task(llm.generate(question))
    if c:
        task = asyncio.create_task(llm.generate("other"))
    return await task
""",
        "if c:",
    ),
    (
        """
import asyncio
from flowc import LLM, workflow
llm = LLM()

@workflow
async def main(question: str) -> str:
    async with asyncio.TaskGroup() as group:
        print("start")
        task = group.create_task(llm.generate(question))
    return task.result()
""",
        'print("start")',
    ),
]
