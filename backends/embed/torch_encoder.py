"""Any encoder that `transformers` knows, from a local directory: the road for what bert.py does not compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowc.ir.errors import ResourceError

__all__ = ["TorchEncoder"]


class TorchEncoder:
    """Token ids to the last layer's states, float32. Loading takes seconds; nothing is ever downloaded."""

    def __init__(self, folder: Path, dtype: str, device: str, threads: int) -> None:
        try:
            import torch
            from transformers import AutoModel
        except ImportError as e:
            raise ResourceError(
                f"{folder} needs torch and transformers", code="F060", hint="pip install 'flowc[local]'"
            ) from e
        self._torch = torch
        self._threads = threads
        try:
            model: Any = AutoModel.from_pretrained(
                str(folder), local_files_only=True, dtype=getattr(torch, dtype), use_safetensors=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as e:
            raise ResourceError(
                f"the model in {folder} cannot be loaded: {e}", code="F065", hint="copy it again"
            ) from e
        self._model = model.eval().to(device)
        self.dim = int(model.config.hidden_size)
        self.max_positions = int(getattr(model.config, "max_position_embeddings", 512))

    def encode(self, sequences: Sequence[Sequence[int]]) -> list[npt.NDArray[np.float32]]:
        """The states of every sequence, each of shape (len(sequence), dim); padding is masked and cut off again."""
        torch = self._torch
        longest = max(len(s) for s in sequences)
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask = torch.zeros(len(sequences), longest, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.as_tensor(sequence)
            mask[row, : len(sequence)] = 1
        before = torch.get_num_threads()
        torch.set_num_threads(1 if len(sequences) == 1 else self._threads)
        try:
            with torch.inference_mode():
                where = self._model.device
                states = self._model(input_ids=ids.to(where), attention_mask=mask.to(where)).last_hidden_state
                states = states.float().cpu().numpy()
        finally:
            torch.set_num_threads(before)
        return [np.asarray(states[row, : len(s)]) for row, s in enumerate(sequences)]
