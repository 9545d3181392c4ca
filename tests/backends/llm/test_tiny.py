"""The tiny random-weight model: complete, small, fast, and the same every time."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from flowc.ir.errors import ConfigError

pytestmark = pytest.mark.models
pytest.importorskip("tokenizers")

CORPUS = ["Use sorted() to get a new list.", "list.sort() sorts in place and returns None."] * 50


def sums(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def test_same_arguments_same_bytes_in_another_process(tmp_path: Path, root: Path) -> None:
    from flowc.backends.llm.tiny import write_tiny_model

    start = time.process_time()
    here = sums(write_tiny_model(tmp_path / "a", seed=3))
    assert time.process_time() - start < 10
    code = f"from flowc.backends.llm.tiny import write_tiny_model as w; w({str(tmp_path / 'b')!r}, seed=3)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(root / "src"), "PYTHONHASHSEED": "7"}
    )
    assert sums(tmp_path / "b") == here
    other = sums(write_tiny_model(tmp_path / "c", seed=4))
    assert {name for name in here if here[name] != other[name]} == {"model.safetensors", "README.md"}
    assert set(here) >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def test_outside_a_checkout_docstrings_are_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowc.backends.llm import tiny

    monkeypatch.setattr(tiny, "_BUNDLED", tmp_path / "nothing")
    folder = tiny.write_tiny_model(tmp_path / "m", vocab=2000, hidden=16)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 2000, "enough text for all merges"


def test_does_not_import_torch(tmp_path: Path, root: Path) -> None:
    code = (
        "import sys; from flowc.backends.llm.tiny import write_tiny_model\n"
        f"write_tiny_model({str(tmp_path / 'm')!r}, vocab=300, corpus=['hello world'])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(root / "src")})


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_transformers_reads_the_whole_folder(tmp_path: Path, architecture: Literal["llama", "qwen2"]) -> None:
    transformers = pytest.importorskip("transformers")
    from flowc.backends.llm.tiny import write_tiny_model

    folder = write_tiny_model(
        tmp_path / "m", layers=3, hidden=48, heads=6, kv_heads=3, vocab=400, corpus=CORPUS, architecture=architecture
    )
    loaded: tuple[Any, Any] = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, loading = loaded
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    assert model.config.num_hidden_layers == 3
    assert float(model.lm_head.weight.detach().std()) == pytest.approx(0.15, rel=0.05)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size <= 400
    text = "Use sorted()! naïve 🚲\n\ttabs"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("sorted")["input_ids"]) < 3, "the merges come from the corpus"
    assert tokenizer.eos_token == "<|im_end|>"
    assert "random weights" in (folder / "README.md").read_text()
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


@pytest.mark.parametrize(
    "sizes", [{"hidden": 50}, {"heads": 4, "kv_heads": 3}, {"layers": 0}, {"vocab": 100}, {"hidden": 12, "heads": 4}]
)
def test_sizes_that_do_not_fit(tmp_path: Path, sizes: dict[str, int]) -> None:
    from flowc.backends.llm.tiny import write_tiny_model

    with pytest.raises(ConfigError):
        write_tiny_model(tmp_path, corpus=CORPUS, **sizes)  # type: ignore[arg-type]
