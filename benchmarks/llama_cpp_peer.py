"""llama.cpp as a peer of the engine: answers batches of prompts, read as JSON lines from stdin, on stdout.

    python benchmarks/llama_cpp_peer.py MODEL_FOLDER THREADS      (needs llama-cpp-python, gguf and safetensors)

The folder's Qwen3 weights are written as a float32 GGUF file beside them. A line `{"prompts": [[token, ...], ...],
"new": n}` is answered by `{"tokens": [[...], ...], "cpu_s": seconds, "prefill_cpu_s": seconds}`. The prompts are
decoded greedily side by side, as `llama-server --parallel` does: one prefill of all, then one token of each in every
`llama_decode`. Keys and values are float32, so that answers can be compared token by token.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def convert(folder: Path) -> Path:
    """The folder's weights as a GGUF file; the tokenizer is a list of made-up words, since prompts are tokens here."""
    out = folder / "model.gguf"
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    writer = gguf.GGUFWriter(str(out), "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    words = [f"w{i}" for i in range(config["vocab_size"])]
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges(["w 0"])
    writer.add_eos_token_id(0)
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem in TOP:
            short = TOP[stem]
        else:
            _, _, layer, rest = stem.split(".", 3)
            short = f"blk.{layer}.{NAMES[rest]}"
        writer.add_tensor(f"{short}.weight", np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


class Peer:
    """A model and a context for up to 16 sequences of 700 tokens."""

    def __init__(self, path: Path, threads: int) -> None:
        llama_cpp.llama_log_set(_silent, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = 16 * 704
        options.n_batch = options.n_ubatch = 512
        options.n_seq_max = 16
        options.n_threads = options.n_threads_batch = threads
        options.type_k = options.type_v = 0  # float32
        options.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)
        self.prefilled_at = 0.0

    def answer(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        memory = llama_cpp.llama_get_memory(self.context)
        llama_cpp.llama_memory_clear(memory, True)
        answers: list[list[int]] = [[] for _ in prompts]
        work = [
            (token, at, number, at == len(prompt) - 1)
            for number, prompt in enumerate(prompts)
            for at, token in enumerate(prompt)
        ]
        for first in range(0, len(work), 512):
            self._decode(work[first : first + 512], answers)
        self.prefilled_at = time.process_time()
        for step in range(1, new):
            pairs = enumerate(zip(prompts, answers, strict=True))
            self._decode([(a[-1], len(p) + step - 1, n, True) for n, (p, a) in pairs], answers)
        return answers

    def _decode(self, work: list[tuple[int, int, int, bool]], answers: list[list[int]]) -> None:
        batch = self.batch
        batch.n_tokens = len(work)
        for i, (token, position, number, wanted) in enumerate(work):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = number, wanted
        if llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        for i, (_, _, number, wanted) in enumerate(work):
            if wanted:
                row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, i), (self.vocab,))
                answers[number].append(int(row.argmax()))


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    pass


def main() -> None:
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    peer = Peer(convert(folder), threads)
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        begin = time.process_time()
        tokens = peer.answer(asked["prompts"], asked["new"])
        end = time.process_time()
        reply = {"tokens": tokens, "cpu_s": end - begin, "prefill_cpu_s": peer.prefilled_at - begin}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
