"""EngineArgs: the arguments of an engine under vLLM's names, and the checks of their values."""

import argparse
import os
from dataclasses import dataclass, field, fields
from typing import Any

from nanovllm.utils import argparse_utils
from nanovllm.validation import (
    accept_unsupported,
    bool_field,
    check_accepted,
    check_fields,
    check_type,
    check_unicode,
    number_field,
    unsupported,
    vllm_defaults,
)

MAX_INT = 2**31 - 1
DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_ALIASES = {"half": "float16", "float": "float32"}  # torch and vLLM know these names, too
EXECUTORS = (None, "mp")  # both mean here that each rank is a process


class HasVars:
    """Lets `vars(args)` work for a dataclass with slots, as scripts written for vLLM need it."""

    __slots__ = ()

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]


@accept_unsupported(vllm_defaults.ENGINE)
@dataclass(slots=True)  # slots make a misspelt attribute an error, as a misspelt argument is
class EngineArgs(HasVars):
    """The arguments of `LLM` and `LLMEngine`. Raises TypeError or ValueError for a bad value.

    `--help` shows the comment above a field as its description (see utils/argparse_utils.py).

    vLLM 0.24 has further arguments, for which this class has no fields. It accepts them with the
    values in `vllm_defaults.ENGINE`, and with no others. If vLLM's default is None and ours is
    not, then None means our default.
    """

    # A local folder in Hugging Face format, or an id on the Hugging Face hub.
    model: str = "Qwen/Qwen3-0.6B"
    # Another folder or id to read the tokenizer from. None means the model's.
    tokenizer: str | None = None
    # Load no tokenizer. Prompts must then be token ids, and text stays empty.
    skip_tokenizer_init: bool = bool_field(False)
    # The revision of an id on the Hugging Face hub.
    revision: str | None = None
    # The dtype to compute in. "auto" means float32 on a CPU, float16 on an old GPU, and the
    # checkpoint's dtype on other GPUs.
    dtype: str = "auto"
    # Where sampling defaults come from: "auto" (the model), "vllm" (none), or a folder.
    generation_config: str = "auto"
    # Sampling defaults that replace those of generation_config.
    override_generation_config: dict[str, Any] = field(default_factory=dict)
    # The device to compute on. "auto" means a usable GPU if there is one, and else the CPU.
    device: str = "auto"
    # The seed of requests that have none.
    seed: int = number_field(0, -(2**63), 2**63 - 1, none_is_default=True)
    # The number of ranks: GPUs, or processes on a CPU.
    tensor_parallel_size: int = number_field(1, 1, MAX_INT)
    # How ranks run. "mp" and None mean a process for each rank.
    distributed_executor_backend: str | None = None
    # The most tokens of a request. None and -1 mean what the model and the cache allow.
    max_model_len: int | None = number_field(None, 1, MAX_INT)
    # The most requests that run at once.
    max_num_seqs: int = number_field(256, 1, 2**16, none_is_default=True)
    # The most tokens of a step. None means a number that suits the device.
    max_num_batched_tokens: int | None = number_field(None, 1, MAX_INT)
    # The tokens of a block of the KV cache.
    block_size: int = number_field(16, 1, MAX_INT, none_is_default=True)
    # The number of blocks of the KV cache, on any device. None means what fits in memory.
    num_gpu_blocks_override: int | None = number_field(None, 1, MAX_INT)
    # The fraction of a GPU's memory that the engine may use.
    gpu_memory_utilization: float = number_field(0.9, 0.01, 1.0)
    # Compute a beginning that several prompts share only once.
    enable_prefix_caching: bool = bool_field(True, none_is_default=True)
    # Let a prompt take several steps.
    enable_chunked_prefill: bool = bool_field(True, none_is_default=True)
    # Launch a step before the tokens of the previous step have been read.
    async_scheduling: bool = bool_field(True, none_is_default=True)
    # Compile nothing and capture no CUDA graphs.
    enforce_eager: bool = bool_field(False)
    # Compute linear layers, norms and gates with torch.compile.
    enable_torch_compile: bool = bool_field(False)
    # The attention backend. "auto" and None mean the fastest that this machine has.
    attention_backend: str = "auto"
    # Show a progress bar while weights are read.
    use_tqdm_on_load: bool = bool_field(True)

    trust_remote_code: bool = unsupported(False)
    quantization: str | None = unsupported(None)
    kv_cache_dtype: str = unsupported("auto")
    pipeline_parallel_size: int = unsupported(1)

    def __post_init__(self) -> None:
        if type(self.max_model_len) in (int, str) and self.max_model_len in (-1, "auto"):
            self.max_model_len = None
        check_fields(self)
        self.model = as_path_or_id("model", self.model)
        self.tokenizer = (
            None if self.tokenizer is None else as_path_or_id("tokenizer", self.tokenizer)
        )
        self.revision = None if self.revision is None else as_path_or_id("revision", self.revision)
        self.dtype = str(self.dtype).removeprefix("torch.")
        self.dtype = DTYPE_ALIASES.get(self.dtype, self.dtype)
        if self.attention_backend is None:
            self.attention_backend = "auto"
        self.generation_config = as_path_or_id("generation_config", self.generation_config)
        check_type("override_generation_config", self.override_generation_config, dict)
        check_unicode("override_generation_config", self.override_generation_config)
        one_rank = ("uni",) if self.tensor_parallel_size == 1 else ()
        torchrun = ("external_launcher",) if "TORCHELASTIC_RUN_ID" in os.environ else ()
        check_accepted(
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
        """Return EngineArgs from the options that a parser has read. Other options are ignored."""
        names = {f.name for f in fields(cls)} | vllm_defaults.ENGINE.keys()
        return cls(**{name: value for name, value in vars(args).items() if name in names})


def as_path_or_id(name: str, value: Any) -> str:
    """Return a folder, or an id on the Hugging Face hub, as a str.

    name: the argument that holds it. value: a str, a Path or another os.PathLike.
    Raises TypeError for other types, such as bytes, and ValueError for an empty name.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    check_type(name, text, str)
    if not text:
        raise ValueError(f"{name} must not be empty, got {value!r}")
    return text
