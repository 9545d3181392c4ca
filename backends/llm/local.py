"""What both local backends stand on: a Hugging Face model as it was loaded, its tokenizer, requests made ready for it.

Imports torch and transformers; import it where a model is wanted, not before.
"""

from __future__ import annotations

import gc
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers

from flowc.ir.errors import FlowcError, ResourceError
from flowc.ir.values import Conversation
from flowc.runtime.protocols import ChooseRequest, GenerateRequest, Generation, IsCancelled, OnText

from .common import check_choice, check_request, plain_chat
from .rows import Row

if TYPE_CHECKING:
    from .structured import Guide, Guides

__all__ = ["Choice", "LocalBackend", "LocalModel"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_SURROGATES = re.compile("[\ud800-\udfff]")
_INCOMPLETE = "\ufffd"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LocalModel:
    """A causal language model and its tokenizer, read from a local folder or the Hugging Face hub.

    `source` is a folder with `config.json`, `*.safetensors` and a tokenizer (nothing is fetched for it), or a hub id
    such as `Qwen/Qwen3-0.6B`, which is downloaded unless it is cached. `dtype` is "float32", "bfloat16", "float16" or
    "auto" (the checkpoint's own). `device` None takes the GPU if there is one. `threads` sets torch's threads for the
    whole process; on a busy machine one is often the fastest. Python that comes with a model runs only with
    `trust_remote_code`, weights are read from safetensors only.

    Raises `ResourceError`: F064 no such folder or hub id, F065 damaged, incomplete or not safetensors, F066 no
    tokenizer, F067 not a causal language model.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        dtype: str = "float32",
        device: str | None = None,
        threads: int | None = None,
        revision: str | None = None,
        name: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if dtype != "auto" and dtype not in _DTYPES:
            raise ResourceError(f"unknown dtype {dtype!r}", hint=f"use one of {', '.join(_DTYPES)}, auto")
        place, is_folder = _locate(source)
        self.name = name or Path(place).name
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        where: dict[str, Any] = {
            "local_files_only": is_folder,
            "trust_remote_code": trust_remote_code,
            "revision": revision or "main",
        }
        config = _load_config(place, where)
        self.tokenizer: Any = _load_tokenizer(place, where)
        self.model: Any = _load_model(place, config, dtype if dtype == "auto" else _DTYPES[dtype], where).to(
            self.device
        )
        self.text_config: Any = config.get_text_config(decoder=True)
        self.context: int | None = getattr(self.text_config, "max_position_embeddings", None)
        self.vocab_size: int = self.text_config.vocab_size
        generation = self.model.generation_config
        ends = generation.eos_token_id if generation.eos_token_id is not None else self.tokenizer.eos_token_id
        self.end_tokens = frozenset([ends] if isinstance(ends, int) else ends or [])
        candidates = (generation.pad_token_id, self.tokenizer.pad_token_id, *sorted(self.end_tokens))
        self.pad = next((t for t in candidates if isinstance(t, int)), 0)
        self._guides: Guides | None = None
        self._told: set[str] = set()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a text, at least one. `special` adds what the tokenizer puts around a prompt.

        A conversation is written by the tokenizer's chat template if it has one. Lone surrogates are read as U+FFFD.
        """
        if isinstance(text, Conversation) and self.tokenizer.chat_template:
            text = self.render_chat(text.messages)
        text = _SURROGATES.sub(_INCOMPLETE, text)
        bos = self.tokenizer.bos_token
        if special and bos and text.startswith(bos):
            special = False  # a chat template has already written it
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special)
        if not ids:  # a model must see something
            start = self.tokenizer.bos_token_id
            ids = [start if start is not None else self.pad]
        return ids

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for a conversation, by the tokenizer's chat template (rendered in transformers' Jinja sandbox).

        Without a template the turns are written as plain text, see `plain_chat`.
        """
        if not self.tokenizer.chat_template:
            return plain_chat(messages)
        try:
            turns = [dict(m) for m in messages]
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except Exception as e:  # a template is a program of the model's author: it may raise anything
            raise ResourceError(
                f"the chat template of {self.name} refused the messages: {e}",
                code="F066",
                hint="many templates want the roles user and assistant in turn, some no system message",
            ) from e

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def row(self, item: int, request: GenerateRequest, on_text: OnText | None) -> Row | FlowcError:
        """A request ready to run, or what is wrong with it. Its limit is cut to what the context still holds."""
        error: FlowcError | None = check_request(request)
        if error is not None:
            return error
        try:
            ids = self.encode(request.prompt)
        except ResourceError as e:  # of the chat template
            return e
        limit = request.max_tokens
        if self.context is not None:
            if len(ids) >= self.context and limit:
                return self.too_long(len(ids))
            limit = min(limit, max(0, self.context - len(ids)))
        guide = self.guide(request.schema) if request.schema is not None else None
        return Row(item, request, ids, limit, self.decode, on_text, guide)

    def guide(self, schema: str) -> Guide | None:
        """What holds a text to a JSON schema. None, with a warning that says why, where that cannot be done."""
        try:
            from .structured import Guides, SchemaError
        except ModuleNotFoundError as e:
            self._warn(f"{e.name} is not installed (pip install 'flowc[local]')")
            return None
        try:
            if self._guides is None:
                self._guides = Guides(self.tokenizer, self.vocab_size, self.end_tokens)
            return self._guides.start(schema)
        except SchemaError as e:
            self._warn(str(e))
            return None

    def _warn(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(f"{self.name} is not held to a schema: {reason}", stacklevel=2)

    def too_long(self, tokens: int) -> ResourceError:
        """The error for a prompt of so many tokens."""
        return ResourceError(
            f"the prompt has {tokens} tokens, but the context of {self.name} holds {self.context} with the answer",
            code="F068",
            hint="retrieve fewer or shorter passages (a smaller k), or use a model with a longer context",
        )

    def free(self) -> None:
        """Gives the weights' memory back."""
        self.model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


Choice = tuple[int, list[int], list[list[int]]]
"""A choice made ready: its place in the call, the tokens of its prompt, those of each option."""


class LocalBackend(ABC):
    """The part of `LLMBackend` that does not depend on how steps are run."""

    kind: ClassVar[str] = "language-model"

    def __init__(self, local: LocalModel) -> None:
        self.local = local
        self.name = local.name
        self._is_closed = False

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        on_text: OnText | None = None,
        is_cancelled: IsCancelled | None = None,
    ) -> Sequence[Generation | Exception]:
        """Completes every request; see `LLMBackend.generate`.

        The answer is cut at the end of the model's context if `max_tokens` reaches beyond it (finish reason "length").
        Lone surrogates in a prompt are read as U+FFFD. `completion_tokens` counts the end token or stop string too,
        and so does `logprobs`.
        """
        self._check_open()
        results: dict[int, Generation | Exception] = {}
        rows: list[Row] = []
        for item, request in enumerate(requests):
            row = self.local.row(item, request, on_text)
            if isinstance(row, FlowcError):
                results[item] = row
            elif row.limit == 0:
                results[item] = Generation("", len(row.ids), 0, "length", () if request.logprobs else None)
            elif (error := self._too_large(len(row.ids))) is not None:
                results[item] = error
            else:
                rows.append(row)
        self._complete(rows, is_cancelled)
        results.update((row.item, row.result()) for row in rows)
        return [results[item] for item in range(len(requests))]

    def choose(self, requests: Sequence[ChooseRequest]) -> Sequence[int | Exception]:
        """The option with the highest total log-probability as a continuation of its prompt, ties to the first.

        The option's tokens are those of its text alone, put after the prompt's; nothing is inserted between, so a
        prompt that ends in "Answer:" wants options such as " yes". Log-probabilities are summed and not divided by
        length: of options that share a beginning the shorter scores at least as high, so let options differ in their
        first words. Nothing is decoded.
        """
        self._check_open()
        results: dict[int, int | Exception] = {}
        asked: list[Choice] = []
        for item, request in enumerate(requests):
            choice = self._choice(item, request)
            if isinstance(choice, FlowcError):
                results[item] = choice
            else:
                asked.append(choice)
        for item, scores in self._scores(asked, requests):
            results[item] = scores if isinstance(scores, Exception) else max(range(len(scores)), key=scores.__getitem__)
        return [results[item] for item in range(len(requests))]

    def _choice(self, item: int, request: ChooseRequest) -> Choice | FlowcError:
        error: FlowcError | None = check_choice(request)
        if error is not None:
            return error
        try:
            ids = self.local.encode(request.prompt)
        except ResourceError as e:  # of the chat template
            return e
        options = [self.local.encode(option, special=False) for option in request.options]
        longest = len(ids) + max(map(len, options))
        if self.local.context is not None and longest > self.local.context:
            return self.local.too_long(longest)
        return self._too_large(longest) or (item, ids, options)

    @abstractmethod
    def close(self) -> None:
        """Frees the model's memory. Later calls raise `ResourceError`."""

    @abstractmethod
    def _complete(self, rows: list[Row], is_cancelled: IsCancelled | None) -> None:
        """Brings rows to their end."""

    @abstractmethod
    def _scores(
        self, asked: list[Choice], requests: Sequence[ChooseRequest]
    ) -> Iterable[tuple[int, list[float] | Exception]]:
        """For every choice its place in the call and the total log-probability of every option."""

    def _too_large(self, tokens: int) -> ResourceError | None:
        """The error for so many tokens at once, where there is a limit besides the model's context."""
        return None

    @property
    def context_tokens(self) -> int | None:
        """How many tokens prompt and answer may have together; None where the architecture sets no limit."""
        return self.local.context

    def count_tokens(self, text: str) -> int:
        """The number of tokens of `text` as a prompt, special tokens that the tokenizer adds included."""
        self._check_open()
        return len(self.local.encode(text))

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for a conversation; see `LocalModel.render_chat`."""
        self._check_open()
        return self.local.render_chat(messages)

    def batch_key(self, request: GenerateRequest) -> Hashable:
        """The same for all requests: rows keep their own parameters, so any can share a batch."""
        return self.name

    def _details(self) -> dict[str, Any]:
        """What is to say of the model itself."""
        self._check_open()
        model = self.local.model
        return {
            "architecture": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(self.local.device),
            "context_tokens": self.local.context,
        }

    def _check_open(self) -> None:
        if self._is_closed:
            raise ResourceError(f"the model {self.name} was closed", hint="open the backend again")


def _locate(model: str | os.PathLike[str]) -> tuple[str, bool]:
    """Where a model is: (folder, True) or (hub id, False)."""
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path), True
    if path.exists():
        raise ResourceError(
            f"{path} is a file, not a model folder", code="F064", hint="name the folder that holds config.json"
        )
    text = os.fspath(model)
    if isinstance(model, str) and _HUB_ID.fullmatch(text) and not text.startswith("."):
        return text, False
    raise ResourceError(
        f"there is no model folder {path}",
        code="F064",
        hint="give a folder with config.json, *.safetensors and tokenizer.json, or a hub id such as Qwen/Qwen3-0.6B; "
        "`flowc model tiny DIR` writes one for tests",
    )


def _load_config(source: str, where: dict[str, Any]) -> Any:
    if where["local_files_only"] and not (Path(source) / "config.json").is_file():
        raise ResourceError(
            f"{source} holds no config.json",
            code="F065",
            hint="name the folder that save_pretrained wrote, or a snapshot of the hub",
        )
    try:
        config: Any = transformers.AutoConfig.from_pretrained(source, **where)
    except Exception as e:  # transformers and the hub raise many types for a bad configuration
        raise _unreadable(source, where, e) from e
    names = getattr(config, "architectures", None) or []
    own = where["trust_remote_code"] and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    causal = own or type(config) in transformers.AutoModelForCausalLM._model_mapping
    if (
        getattr(config, "is_encoder_decoder", False)
        or not causal
        or (names and not any("LM" in n or "ConditionalGeneration" in n for n in names))
    ):
        what = ", ".join(names) or type(config).__name__
        raise ResourceError(
            f"{source} is no causal language model: it holds {what}",
            code="F067",
            hint="use a model whose architecture ends in ForCausalLM",
        )
    if any("MaskedLM" in n for n in names):
        raise ResourceError(
            f"{source} is no causal language model: it holds {', '.join(names)}",
            code="F067",
            hint="use a model whose architecture ends in ForCausalLM",
        )
    return config


def _load_tokenizer(source: str, where: dict[str, Any]) -> Any:
    hint = "put the model's tokenizer.json and tokenizer_config.json into the folder"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **where)
    except Exception as e:
        raise ResourceError(f"{source} has no usable tokenizer: {_first_line(e)}", code="F066", hint=hint) from e
    if not len(tokenizer):
        raise ResourceError(f"{source} has no usable tokenizer: it holds no vocabulary", code="F066", hint=hint)
    return tokenizer


def _load_model(source: str, config: Any, dtype: Any, where: dict[str, Any]) -> Any:
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    try:
        with _quiet():
            model, loading = load(
                source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **where
            )
    except Exception as e:
        raise _unreadable(source, where, e) from e
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ResourceError(
            f"the weights of {source} are incomplete: {missing[0]}{more} missing",
            code="F065",
            hint="fetch the model again",
        )
    return model.eval()


def _unreadable(source: str, where: dict[str, Any], e: Exception) -> ResourceError:
    if where["local_files_only"]:
        return ResourceError(
            f"the model in {source} cannot be read: {_first_line(e)}",
            code="F065",
            hint="it needs a valid config.json and weights in *.safetensors (convert others with save_pretrained)",
        )
    return ResourceError(
        f"{source} is neither a folder here nor a model that the hub gave out: {_first_line(e)}",
        code="F064",
        hint="check the spelling and the connection, or give the path of a model folder",
    )


def _first_line(e: Exception) -> str:
    return next(iter(str(e).strip().splitlines()), type(e).__name__)[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar on stderr while weights load: the command line has its own."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
