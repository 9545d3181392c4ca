"""The device of torch. Without a GPU it runs on the CPU, one thing after another, with the kernel's reference."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed: it exists for Linux only, as the [gpu] extra")
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowc.backends.vector.device.cuda import TorchDevice
from flowc.backends.vector.device.devices import Layout, name_of
from flowc.ir.errors import ResourceError
from tests.backends.vector.device.rig import Rig, few_directions, rows, scattered

KIND = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"


def landed(rig: Rig) -> None:
    for _ in range(1000):
        rig.cache.pump()
        if not rig.cache._queue and not rig.cache._flying:
            return
        rig.device.wait(0.001)
    raise AssertionError("transfers do not end")


@settings(max_examples=30)
@given(data=st.data(), count=st.integers(5, 150), codec=st.sampled_from(["fp16", "fp32"]), l2=st.booleans())
def test_it_finds_what_the_cpu_finds(data: st.DataObject, count: int, codec: str, l2: bool) -> None:
    make: Any = data.draw(st.sampled_from([scattered, few_directions]))
    vectors = make(count, data.draw(st.integers(0, 5), label="seed"))
    nlist = data.draw(st.integers(1, min(count, 8)), label="nlist")
    device = TorchDevice(KIND, launch_s=0.0, ring_bytes=100)
    rig = Rig(vectors, nlist, codec, l2=l2, device=device, share=2.0, page=16)
    for bound in data.draw(st.lists(st.sampled_from([0.3, 1.0, 2.0]), min_size=1, max_size=3), label="bounds"):
        rig.cache.set_bound(int(bound * vectors.nbytes))
        rig.announce("some", sorted(data.draw(st.sets(st.integers(0, nlist - 1), min_size=1), label="lists")))
        landed(rig)
        at = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=4), label="queries")
        queries = np.ascontiguousarray(vectors[at])
        ks, nprobes = [data.draw(st.sampled_from([1, 5])) for _ in at], [nlist for _ in at]
        expected = [rows(found) for found in rig.plain.search(queries, ks, nprobes)]
        assert [rows(found) for found in rig.lists.search(queries, ks, nprobes)] == expected
    assert rig.scanner.failure is None
    rig.check()
    rig.cache.close()


def test_pages_may_move_and_lists_may_lie_in_several_chunks() -> None:
    layout = Layout(4, np.dtype(np.float32), page=8, chunk=2, largest=20)
    device = TorchDevice(KIND)
    device.open(layout)
    device.resize(3)
    codes = np.arange(80, dtype=np.float32).reshape(20, 4)
    transfer = device.copy(np.array([1, 2, 5]), codes, name_of(7))
    while transfer is None or not transfer.done:
        device.wait(0.01)
    query = np.array([[1.0, 0.0, 0.0, 0.0]], dtype=np.float32)
    scores, names = device.scan(query, [np.array([1, 2, 5])], 3).result()
    assert scores.tolist() == [[76.0, 72.0, 68.0]]
    assert names.tolist() == [[name_of(7, 19), name_of(7, 18), name_of(7, 17)]]
    device.move(np.array([5]), np.array([0]))
    device.resize(2)
    scores, names = device.scan(query, [np.array([0])], 3).result()
    assert names.tolist() == [[name_of(7, 19), name_of(7, 18), name_of(7, 17)]]
    device.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ResourceError, match="no GPU") as error:
        TorchDevice("cuda")
    assert error.value.code == "F060"
