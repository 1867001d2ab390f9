"""EngineArgs: what an engine may be told, under vLLM's names, and the checks it must pass."""

import argparse
import os
from dataclasses import dataclass, field, fields
from typing import Any

from nanovllm.utils import argparse_utils
from nanovllm.validation import (
    also_takes,
    check_fields,
    check_only,
    check_type,
    check_unicode,
    flag,
    number,
    only,
    vllm_defaults,
)

LARGEST = 2**31 - 1
DTYPES = ("auto", "float32", "bfloat16", "float16")
OTHER_NAMES = {"half": "float16", "float": "float32"}  # of dtypes, in torch and vLLM
EXECUTORS = (None, "mp")  # each rank is a process of its own


class HasVars:
    """Gives a dataclass with slots the `vars(...)` that scripts for vLLM pass on to LLM."""

    __slots__ = ()

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]


@also_takes(vllm_defaults.ENGINE)
@dataclass(slots=True)  # a misspelt attribute is an error, as a misspelt argument is
class EngineArgs(HasVars):
    """Arguments of `LLM` and `LLMEngine`. Raises TypeError or ValueError for a bad one.

    The arguments of vLLM 0.24 that are no fields here are taken with the values that
    `vllm_defaults.ENGINE` lists, and with no others. Where vLLM's default is None and ours is
    not, None means ours.
    """

    model: str = "Qwen/Qwen3-0.6B"  # a local folder in Hugging Face format, or a Hugging Face id
    tokenizer: str | None = None  # another folder or id; None: the model's
    skip_tokenizer_init: bool = flag(False)  # prompts must be token ids, and text stays empty
    revision: str | None = None  # of a Hugging Face id
    dtype: str = "auto"  # float32 on a CPU, float16 on an old GPU, else the checkpoint's
    generation_config: str = "auto"  # whose sampling defaults: the model's, "vllm", or a folder's
    override_generation_config: dict[str, Any] = field(default_factory=dict)  # goes before those
    device: str = "auto"  # a usable GPU, else the CPU
    seed: int = number(0, -(2**63), 2**63 - 1, none_is_default=True)  # of what is drawn at random
    tensor_parallel_size: int = number(1, 1, LARGEST)  # GPUs, or processes on a CPU
    distributed_executor_backend: str | None = None  # "mp": a process each
    max_model_len: int | None = number(None, 1, LARGEST)  # None, -1: what model and cache allow
    max_num_seqs: int = number(256, 1, 2**16, none_is_default=True)  # requests running at once
    max_num_batched_tokens: int | None = number(None, 1, LARGEST)  # a step; None: by device
    block_size: int = number(16, 1, LARGEST, none_is_default=True)  # tokens a block of the KV cache
    num_gpu_blocks_override: int | None = number(None, 1, LARGEST)  # block count, on any device
    gpu_memory_utilization: float = number(0.9, 0.01, 1.0)  # part of a GPU's memory to use
    enable_prefix_caching: bool = flag(True, none_is_default=True)  # compute a beginning once
    enable_chunked_prefill: bool = flag(
        True, none_is_default=True
    )  # a prompt may take several steps
    async_scheduling: bool = flag(True, none_is_default=True)  # launch before tokens are read
    enforce_eager: bool = flag(False)  # compile and capture nothing
    enable_torch_compile: bool = flag(False)  # products, norms and gates by torch.compile
    attention_backend: str = "auto"  # "auto" or None: the fastest that this machine has
    use_tqdm_on_load: bool = flag(True)  # show a progress bar while weights are read

    trust_remote_code: bool = only(False)
    quantization: str | None = only(None)
    kv_cache_dtype: str = only("auto")
    pipeline_parallel_size: int = only(1)

    def __post_init__(self) -> None:
        if type(self.max_model_len) in (int, str) and self.max_model_len in (-1, "auto"):
            self.max_model_len = None
        check_fields(self)
        self.model = as_name("model", self.model)
        self.tokenizer = None if self.tokenizer is None else as_name("tokenizer", self.tokenizer)
        self.revision = None if self.revision is None else as_name("revision", self.revision)
        self.dtype = str(self.dtype).removeprefix("torch.")
        self.dtype = OTHER_NAMES.get(self.dtype, self.dtype)
        self.attention_backend = (
            "auto" if self.attention_backend is None else self.attention_backend
        )
        self.generation_config = as_name("generation_config", self.generation_config)
        check_type("override_generation_config", self.override_generation_config, dict)
        check_unicode("override_generation_config", self.override_generation_config)
        one_rank = ("uni",) if self.tensor_parallel_size == 1 else ()
        torchrun = ("external_launcher",) if "TORCHELASTIC_RUN_ID" in os.environ else ()
        check_only(
            "distributed_executor_backend",
            self.distributed_executor_backend,
            (*EXECUTORS, *one_rank, *torchrun),
        )
        check_type("device", self.device, str)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.enforce_eager and self.enable_torch_compile:
            raise ValueError("enforce_eager=True compiles nothing, enable_torch_compile=True does")

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add an option for every argument to a parser, under vLLM's names, and return it."""
        argparse_utils.add_options(parser, EngineArgs)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> "EngineArgs":
        """Make EngineArgs of what a parser with these options has read; it may have read more."""
        names = {f.name for f in fields(cls)} | vllm_defaults.ENGINE.keys()
        return cls(**{name: value for name, value in vars(args).items() if name in names})


def as_name(name: str, value: Any) -> str:
    """A folder or a name on the Hugging Face hub as a str. A Path, or another os.PathLike, is one.

    Raises TypeError for other types, such as bytes, and ValueError for an empty name.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    check_type(name, text, str)
    if not text:
        raise ValueError(f"{name} must not be empty, got {value!r}")
    return text
