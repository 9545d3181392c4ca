"""The script that measures the kernels on a GPU runs where there is none, and claims nothing there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux only, as the [gpu] extra")


def run(root: Path, out: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(root / "benchmarks" / "gpu.py"), "--json", str(out), *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def test_without_a_device(root: Path, tmp_path: Path) -> None:
    found = run(root, tmp_path / "gpu.json")
    assert found["ran"] is False
    assert found["reason"].startswith("no CUDA device here")


def test_rehearsal(root: Path, tmp_path: Path) -> None:
    """Every case runs, every comparison is made, and no time is kept."""
    found = run(root, tmp_path / "gpu.json", "--rehearse")
    assert found["rehearsal"] is True
    assert found["errors"] == found["left_out"] == []
    assert len(found["agreement"]) == 15
    assert all(entry["agrees"] for entry in found["agreement"])
    assert len(found["measured"]) == 18
    assert all(set(entry) == {"name", "variant", "graph"} for entry in found["measured"])
