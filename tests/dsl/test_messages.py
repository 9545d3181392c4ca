"""What a program makes of an error's text is what plain Python makes of it; the place is added where it leaves."""

from typing import Any

import pytest

from flowc import LLM, workflow
from flowc.ir.errors import FlowcError

llm = LLM("default")


@workflow
def caught(prompt: Any) -> str:
    try:
        return llm.generate(prompt, max_tokens=4)
    except Exception as error:
        return str(error)


@workflow
def raised(prompt: Any) -> str:
    return llm.generate(prompt, max_tokens=4)


@workflow
def added(a: int, b: Any) -> Any:
    llm.generate("x", max_tokens=4)
    a += b
    return a


@workflow
def added_to(a: int, words: Any) -> Any:
    a += llm.generate(f"{words}", max_tokens=4)  # type: ignore[operator]  # fails, that is the point
    return a


@pytest.mark.parametrize("opt", range(4))
def test_a_handler_sees_the_text_that_plain_python_gives(opt: int) -> None:
    assert caught.compile(opt=opt)(3) == caught.eager(3)
    with pytest.raises(FlowcError) as error:
        raised.compile(opt=opt)(3)
    assert "test_messages.py:23" in str(error.value)


@pytest.mark.parametrize("opt", range(4))
@pytest.mark.parametrize(("wf", "right"), [(added, [1]), (added, "1"), (added_to, "w")])
def test_augmented_assignment_fails_in_its_own_words(wf: Any, right: Any, opt: int) -> None:
    with pytest.raises(TypeError) as expected:
        wf.eager(3, right)
    with pytest.raises(TypeError) as found:
        wf.compile(opt=opt)(3, right)
    assert "+=" in str(expected.value)
    assert str(found.value) == str(expected.value)
    assert added.compile(opt=opt)(3, 4) == 7
