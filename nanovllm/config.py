"""EngineArgs: what an engine may be told, under vLLM's names, and the checks it must pass."""

import os
from dataclasses import dataclass
from typing import Any

from nanovllm.validation import check_fields, check_type, flag, number, only

LARGEST = 2**31 - 1
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(slots=True)  # a misspelt attribute is an error, as a misspelt argument is
class EngineArgs:
    """Arguments of `LLM` and `LLMEngine`. Raises TypeError or ValueError for a bad one."""

    model: str  # a local folder in Hugging Face format, or a Hugging Face id
    tokenizer: str | None = None  # another folder or id; None: the model's
    skip_tokenizer_init: bool = flag(False)  # prompts must be token ids, and text stays empty
    revision: str | None = None  # of a Hugging Face id
    dtype: str = "auto"  # float32 on a CPU, float16 on an old GPU, else the checkpoint's
    device: str = "auto"  # a usable GPU, else the CPU
    seed: int = number(0, -(2**63), 2**63 - 1)
    tensor_parallel_size: int = number(1, 1, LARGEST)
    max_model_len: int | None = number(None, 1, LARGEST)  # None: what model and cache allow
    max_num_seqs: int = number(256, 1, 2**16)  # requests running at once
    max_num_batched_tokens: int | None = number(None, 1, LARGEST)  # a step; None: by device
    block_size: int = number(16, 1, LARGEST)  # tokens a block of the KV cache
    num_gpu_blocks_override: int | None = number(None, 1, LARGEST)  # block count, on any device
    gpu_memory_utilization: float = number(0.9, 0.01, 1.0)
    enable_prefix_caching: bool = flag(True)
    enable_chunked_prefill: bool = flag(True)
    async_scheduling: bool = flag(True)  # launch a step before the last one's tokens are read
    enforce_eager: bool = flag(False)  # compile and capture nothing
    enable_torch_compile: bool = flag(False)  # products, norms and gates by torch.compile
    attention_backend: str = "auto"
    use_tqdm_on_load: bool = flag(True)

    trust_remote_code: bool = only(False)
    quantization: str | None = only(None)
    kv_cache_dtype: str = only("auto")
    pipeline_parallel_size: int = only(1)

    def __post_init__(self) -> None:
        check_fields(self)
        self.model = as_name("model", self.model)
        self.tokenizer = None if self.tokenizer is None else as_name("tokenizer", self.tokenizer)
        self.revision = None if self.revision is None else as_name("revision", self.revision)
        self.dtype = str(self.dtype).removeprefix("torch.")
        check_type("device", self.device, str)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.enforce_eager and self.enable_torch_compile:
            raise ValueError("enforce_eager=True compiles nothing, enable_torch_compile=True does")


def as_name(name: str, value: Any) -> str:
    """A folder or a name on the Hugging Face hub as a str. A Path, or another os.PathLike, is one.

    Raises TypeError for other types, such as bytes, and ValueError for an empty name.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    check_type(name, text, str)
    if not text:
        raise ValueError(f"{name} must not be empty, got {value!r}")
    return text
