"""Bindings to llama.cpp's C interface in the wheel `xllamacpp`; no other file calls it.

The functions are those of `llama.h`. Structures are passed by value, so their layout must be that of the release they
were written for: the wheel's version is pinned, the library's defaults are compared when it is loaded, and a context
must report what it was given. It knows nothing of grammars, steps or requests.

Shapes: N tokens of a batch, V vocabulary.
"""

import ctypes
import sys
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mote.core.errors import MoteError, UserError
from mote.core.machine import LLAMACPP, LLAMACPP_VERSION

CacheType = Literal["f32", "f16", "q8_0"]
BATCH = 128  # most tokens of one call; more are not faster on a CPU and delay decoding sequences
_TYPES = {"f32": 0, "f16": 1, "q8_0": 8}
_ERROR = 4  # ggml's log level


class _ModelParams(Structure):
    _fields_ = [
        ("devices", c_void_p), ("tensor_buft_overrides", c_void_p), ("n_gpu_layers", c_int32),
        ("split_mode", c_int32), ("load_mode", c_int32), ("lazy_mode", c_int32), ("main_gpu", c_int32),
        ("tensor_split", c_void_p), ("progress_callback", c_void_p), ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p), ("vocab_only", c_bool), ("check_tensors", c_bool), ("use_extra_bufts", c_bool),
        ("no_host", c_bool), ("no_alloc", c_bool), ("load_mtp", c_bool),
    ]  # fmt: skip


class _ContextParams(Structure):
    _fields_ = [
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32), ("n_outputs_max", c_uint32), ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32), ("n_threads_batch", c_int32), ("ctx_type", c_int32), ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32), ("attention_type", c_int32), ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float), ("rope_freq_scale", c_float), ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float), ("yarn_beta_fast", c_float), ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32), ("defrag_thold", c_float), ("cb_eval", c_void_p), ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32), ("type_v", c_int32), ("moe_cache_size", c_size_t), ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p), ("embeddings", c_bool), ("offload_kqv", c_bool), ("no_perf", c_bool),
        ("op_offload", c_bool), ("swa_full", c_bool), ("kv_unified", c_bool), ("samplers", c_void_p),
        ("n_samplers", c_size_t), ("ctx_other", c_void_p),
    ]  # fmt: skip


class _Batch(Structure):
    _fields_ = [
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    ]  # fmt: skip


# What the library's default settings are; those that are not listed are 0.
_DEFAULTS: dict[str, float] = {
    "n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True, "n_ctx": 512,
    "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1, "n_threads": 4,
    "n_threads_batch": 4, "rope_scaling_type": -1, "pooling_type": -1, "attention_type": -1, "flash_attn_type": -1,
    "yarn_ext_factor": -1, "yarn_attn_factor": -1, "yarn_beta_fast": -1, "yarn_beta_slow": -1, "defrag_thold": -1,
    "type_k": 1, "type_v": 1, "offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True,
}  # fmt: skip
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)


class LlamaModel:
    """A GGUF model in llama.cpp with a KV cache for several sequences; one thread may use it at a time.

    Args:
        path: GGUF file.
        threads: Threads of a forward pass.
        loras: LoRA files for `use`.

    Attributes:
        vocabulary: Number of logits V.
        keeps_prefixes: Whether tokens stay in the cache as long as their sequence does. In layers with a window,
            llama.cpp overwrites a sequence's older tokens as soon as it needs room, without notice.

    Raises:
        UserError: The library is not installed, or is another release.
        MoteError: It cannot load the files.
    """

    def __init__(self, path: Path, threads: int, loras: Sequence[Path] = ()) -> None:
        self._context: Any = None
        self._model: Any = None
        self._lib = lib = load_library()
        self._threads = threads
        self._model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self._model:
            raise MoteError(f"engine: llama.cpp cannot load {path}; remove the file and run the same command again")
        self._batch = lib.llama_batch_init(BATCH, 0, 1)
        self.vocabulary: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self.keeps_prefixes: bool = lib.llama_model_n_swa(self._model) == 0
        self._loras = [lib.llama_adapter_lora_init(self._model, str(lora).encode()) for lora in loras]
        if not all(self._loras):
            raise MoteError(f"engine: llama.cpp cannot load {loras[self._loras.index(None)]}; remove the file")

    def open(self, sequences: int, tokens: int, cache_type: CacheType) -> None:
        """Make an empty cache; an earlier one is freed.

        Args:
            sequences: Maximum number of sequences.
            tokens: Number of tokens it can hold, over all sequences.
            cache_type: Type of keys and values.

        Raises:
            MoteError: There is not enough memory, or the library interprets its settings differently.
        """
        lib = self._lib
        if self._context:
            lib.llama_free(self._context)
        params = lib.llama_context_default_params()
        params.n_ctx = tokens
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max = sequences
        params.n_outputs_max = params.n_outputs_max_per_seq = BATCH
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = _TYPES[cache_type]
        params.flash_attn_type = 0 if cache_type == "f32" else -1
        params.kv_unified = True
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise MoteError(f"engine: llama.cpp has no memory for a cache of {tokens} tokens; run fewer sequences")
        given = (lib.llama_n_ctx(self._context), lib.llama_n_batch(self._context), lib.llama_n_seq_max(self._context))
        if given[0] < tokens or given[1:] != (BATCH, sequences):
            raise MoteError(f"engine: the library {LLAMACPP} interprets its settings differently; {_remedy()}")
        self._memory = lib.llama_get_memory(self._context)

    def decode(
        self, ids: Sequence[int], positions: Sequence[int], sequences: Sequence[int], keep: Sequence[int]
    ) -> Tensor:
        """Compute N tokens, at most `BATCH`, and append them to their sequences.

        Args:
            ids: Token ids.
            positions: Position of each.
            sequences: Sequence of each.
            keep: Ascending indices of the tokens whose logits are wanted.

        Returns:
            Logits (len(keep), V).

        Raises:
            MoteError: The cache is full, or the library failed.
        """
        batch = self._batch
        batch.n_tokens = len(ids)
        wanted = frozenset(keep)
        for index, (id_, position, sequence) in enumerate(zip(ids, positions, sequences, strict=True)):
            batch.token[index] = id_
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = index in wanted
        if code := self._lib.llama_decode(self._context, batch):
            raise MoteError(f"engine: llama.cpp failed to compute {len(ids)} tokens (llama_decode gave {code})")
        logits = torch.empty(len(keep), self.vocabulary)
        for row, index in enumerate(keep):
            found = self._lib.llama_get_logits_ith(self._context, index)
            logits[row] = torch.from_numpy(np.ctypeslib.as_array(found, (self.vocabulary,)))
        return logits

    def use(self, lora: int | None) -> None:
        """Compute the next tokens with one of the LoRAs, by its index, or with none."""
        count = 0 if lora is None else 1
        pointers = (c_void_p * 1)(*([] if lora is None else [self._loras[lora]]))
        if code := self._lib.llama_set_adapters_lora(self._context, pointers, count, (c_float * 1)(1.0)):
            raise MoteError(f"engine: llama.cpp failed to change the LoRA (llama_set_adapters_lora gave {code})")

    def remove(self, sequence: int, start: int = 0) -> None:
        """Remove a sequence's tokens from position `start` on.

        Raises:
            MoteError: The model's cache cannot be cut there.
        """
        if not self._lib.llama_memory_seq_rm(self._memory, sequence, start, -1):
            raise MoteError("engine: llama.cpp cannot cut this model's cache; use --engine transformers")

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a sequence begin with the first tokens of another one, which are stored once."""
        self._lib.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def close(self) -> None:
        """Free the model and the cache."""
        if self._context:
            self._lib.llama_free(self._context)
            self._context = None
        if self._model:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_model_free(self._model)
            self._model = None

    def __del__(self) -> None:
        if not sys.is_finalizing():  # freeing logs, and there is no interpreter to log to
            self.close()


@cache
def load_library() -> Any:
    """The library with its functions' types.

    Raises:
        UserError: It is not installed, or is another release than the one this file was written for.
        MoteError: Its structures have another layout.
    """
    try:
        found = metadata.version(LLAMACPP)
    except metadata.PackageNotFoundError as error:
        raise UserError(f"engine: llama.cpp is not installed; {_remedy()}") from error
    if found != LLAMACPP_VERSION:
        raise UserError(f"engine: {LLAMACPP} {found} is not the release that `mote` was tested with; {_remedy()}")
    import xllamacpp

    lib = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = arguments
    defaults = (lib.llama_model_default_params(), lib.llama_context_default_params())
    if any(
        getattr(p, name) != _DEFAULTS.get(name, 0) for p in defaults for name, kind in p._fields_ if kind != c_void_p
    ):
        raise MoteError(f"engine: the structures of the library {LLAMACPP} are not those expected; {_remedy()}")
    lib.llama_log_set(_QUIET, None)
    lib.llama_backend_init()
    return lib


def _remedy() -> str:
    return (
        f"pip install 'mote-align[llamacpp]' (which takes {LLAMACPP}=={LLAMACPP_VERSION}), or use engine=transformers"
    )


def _log(level: int, text: bytes, _: Any) -> None:
    if level == _ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


_QUIET = _LOG(_log)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_log_set": (None, [_LOG, c_void_p]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
    "llama_init_from_model": (c_void_p, [c_void_p, _ContextParams]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_model_n_swa": (c_int32, [c_void_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_n_batch": (c_uint32, [c_void_p]),
    "llama_n_seq_max": (c_uint32, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_memory_seq_cp": (None, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
    "llama_batch_init": (_Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),
    "llama_set_adapters_lora": (c_int32, [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]),
    "llama_free": (None, [c_void_p]),
    "llama_model_free": (None, [c_void_p]),
}
