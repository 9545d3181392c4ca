"""The engine on a GPU: copies ordered against steps, the kernels in place of the gathered attention.

Skipped where there is no CUDA device. What of this can be seen without one is seen in the last test.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flowc.backends.llm.paged import attention  # noqa: E402
from flowc.backends.llm.paged.copies import Copy, Costs, ThreadCopier  # noqa: E402
from flowc.backends.llm.paged.engine import Engine  # noqa: E402
from flowc.backends.llm.paged.model import PagedModel  # noqa: E402
from flowc.backends.llm.paged.pool import KVPool  # noqa: E402
from tests.backends.llm.paged.test_exact import ARCHITECTURES, drive, engine_for, owner, reference, sequence  # noqa: E402

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
pytestmark = pytest.mark.models


def pool(device: str, *, pin: bool = False) -> KVPool:
    return KVPool(
        40,
        layers=4,
        block_size=16,
        kv_heads=4,
        head_dim=64,
        dtype=torch.float32,
        device=torch.device(device),
        pin=pin,
    )


@needs_gpu
def test_a_copy_waits_for_the_steps_before_it_and_they_for_its_end() -> None:
    gpu, host = pool("cuda"), pool("cpu", pin=True)
    ended = threading.Event()
    copier = ThreadCopier(ended.set)
    pairs = [(i, i) for i in range(1, 30)]
    for turn in range(5):
        torch.cuda._sleep(50_000_000)  # a long step that writes the blocks at its end
        gpu.data.fill_(float(turn))
        ended.clear()
        copier.submit(Copy(gpu, host, pairs))
        assert ended.wait(30)
        copier.finished()
        assert (host.data[1:30] == turn).all()
        host.data.fill_(-1.0 - turn)
        torch.cuda._sleep(50_000_000)
        seen = gpu.data.clone()  # reads the blocks that the next copy overwrites
        ended.clear()
        copier.submit(Copy(host, gpu, pairs))
        assert ended.wait(30)
        copier.finished()
        after = gpu.data[1:30].clone()
        assert (seen == turn).all()
        assert (after == -1.0 - turn).all()
    copier.close()


@needs_gpu
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_are_those_of_generate_on_the_cpu(name: str) -> None:
    model, prompts, expected = reference(name)
    engine = Engine(PagedModel(copy.deepcopy(model).cuda(), name), blocks=64)
    for _ in range(2):
        sequences = [sequence(p) for p in prompts]
        drive(engine, [sequences])
        assert [owner(s).tokens for s in sequences] == expected


@needs_gpu
def test_pressure_to_the_host_and_back() -> None:
    model, prompts, expected = reference("llama")
    paged = PagedModel(copy.deepcopy(model).cuda(), "llama")
    costs = Costs(load_s=1e-6, token_s=1.0)
    engine = Engine(paged, block_size=16, blocks=11, host_blocks=80, costs=costs, poison=True)
    jobs = [i for _ in range(4) for i in range(len(prompts))]
    sequences = [sequence(prompts[i]) for i in jobs]
    engine.submit(sequences)
    assert all(owner(s).done.wait(60) for s in sequences)
    engine.close()
    assert [owner(s).tokens for s in sequences] == [expected[i] for i in jobs]
    assert engine.stats.loaded_blocks > 0


def test_the_kernels_fit_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, on the CPU: what the engine hands over is what the kernels take; with windows and sinks."""
    pytest.importorskip("triton", reason="triton is not installed: it exists for Linux only, as the [gpu] extra")
    model, prompts, expected = reference("gpt_oss")
    calls: list[Any] = []

    def on_any_device(query: Any) -> Any:
        calls.append(query.shape)
        return attention.triton_attention()

    monkeypatch.setattr(attention, "_kernels_for", on_any_device)
    engine = engine_for(model, "gpt_oss", max_step_tokens=24)
    sequences = [sequence(prompts[i], 2) for i in (1, 3)]
    drive(engine, [sequences])
    assert [owner(s).tokens for s in sequences] == [expected[i][:2] for i in (1, 3)]
    assert calls
