"""The examples in docstrings run, and give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [(ROOT / "src" / "flowc", ROOT / "src")]
FOLDERS += [(ROOT / name, ROOT) for name in ("backends", "dsl", "ir", "passes", "runtime")]


def modules_with_examples() -> list[str]:
    found = []
    for folder, base in FOLDERS:
        for path in sorted(folder.rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                name = ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
                found.append(name if base != ROOT else f"flowc.{name}")
    return found


@pytest.mark.parametrize("module", modules_with_examples())
def test_examples_are_true(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS | doctest.FAIL_FAST)
    assert result.attempted > 0, "the file holds `>>>`, but not in a docstring that doctest finds"
    assert result.failed == 0
