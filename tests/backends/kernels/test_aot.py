"""Every kernel compiles for compute capability 9.0 without a device, fits its memory, and uses its units."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux only, as the [gpu] extra")

LIMIT_BYTES = 227 * 1024


@pytest.fixture(scope="module")
def compiled(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the compiler says of every kernel, by name; in a process of its own, as this one interprets them."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),  # nothing is taken over from an earlier run
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "flowc.backends.kernels.aot"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return {made["name"]: made for made in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
def test_shared_memory_suffices(compiled: dict[str, dict[str, Any]]) -> None:
    assert {name.partition("/")[0] for name in compiled} == {"attention", "kv_write", "block_copy", "page_scan"}
    too_large = {name: made["shared_bytes"] for name, made in compiled.items() if made["shared_bytes"] > LIMIT_BYTES}
    assert too_large == {}


@pytest.mark.slow
def test_tensor_cores_are_used(compiled: dict[str, dict[str, Any]]) -> None:
    """Prefill in the warp-group form that Hopper's rate needs; a decode's tile of 16 rows is too small for it."""
    half = [name for name in compiled if name.startswith("attention/") and name.endswith("float16")]
    prefill = {name: compiled[name]["wgmma"] for name in half if "/prefill/" in name}
    decode = {name: compiled[name]["mma_sync"] for name in half if "/decode/" in name}
    assert len(prefill) >= 7
    assert len(decode) >= 7
    assert [name for name, count in (prefill | decode).items() if count == 0] == []


@pytest.mark.slow
def test_loads_are_asynchronous(compiled: dict[str, dict[str, Any]]) -> None:
    """Without a word about alignment there would be none: the strides of pools and tables are multiples of 16."""
    attention = [name for name in compiled if name.startswith(("attention/prefill", "attention/decode"))]
    half = [name for name in attention if name.endswith("float16")]
    assert len(half) >= 14
    assert [name for name in half if compiled[name]["cp_async"] == 0] == []
