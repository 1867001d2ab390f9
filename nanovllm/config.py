"""EngineArgs: what an engine may be told, under vLLM's names, and the checks it must pass."""

from dataclasses import dataclass
from typing import Any

from nanovllm.validation import (
    check_choice,
    check_number,
    check_type,
    only,
    refuse_what_is_not_here,
)

LARGEST = 2**31 - 1
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class EngineArgs:
    """Arguments of `LLM` and `LLMEngine`. Raises TypeError or ValueError for a bad one."""

    model: str  # a local folder in Hugging Face format, or a Hugging Face id
    tokenizer: str | None = None  # another folder or id; None: the model's
    skip_tokenizer_init: bool = False  # then prompts must be token ids, and text stays empty
    revision: str | None = None  # of a Hugging Face id
    dtype: str = "auto"  # float32 on a CPU, float16 on an old GPU, else the checkpoint's
    device: str = "auto"  # a usable GPU, else the CPU
    seed: int = 0
    tensor_parallel_size: int = 1
    max_model_len: int | None = None  # prompt and output; None: what model and cache allow
    max_num_seqs: int = 256  # requests running at once
    max_num_batched_tokens: int | None = None  # tokens a step; None: 512 on a CPU, else 16,384
    block_size: int = 16  # tokens a block of the KV cache
    num_gpu_blocks_override: int | None = None  # vLLM's name; sets the block count on any device
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    async_scheduling: bool = True  # plan and launch a step before the last one's tokens are read
    enforce_eager: bool = False
    attention_backend: str = "auto"
    use_tqdm_on_load: bool = True

    trust_remote_code: bool = only(False)
    tokenizer_mode: str = only("auto")
    load_format: str = only("auto")
    quantization: str | None = only(None)
    kv_cache_dtype: str = only("auto")
    pipeline_parallel_size: int = only(1)
    data_parallel_size: int = only(1)
    cpu_offload_gb: float = only(0)
    enable_lora: bool = only(False)
    speculative_config: Any = only(None)
    rope_scaling: Any = only(None)
    hf_overrides: Any = only(None)
    limit_mm_per_prompt: Any = only(None)

    def __post_init__(self) -> None:
        refuse_what_is_not_here(self)
        self.model = str(self.model)
        self.tokenizer = None if self.tokenizer is None else str(self.tokenizer)
        self.dtype = str(self.dtype).removeprefix("torch.")
        check_choice("dtype", self.dtype, DTYPES)
        check_type("device", self.device, str)
        check_number("seed", self.seed, -(2**63), 2**63 - 1)
        for name in ("tensor_parallel_size", "max_num_seqs", "block_size"):
            check_number(name, getattr(self, name), 1, LARGEST)
        for name in ("max_model_len", "max_num_batched_tokens", "num_gpu_blocks_override"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 1, LARGEST)
        check_number("gpu_memory_utilization", self.gpu_memory_utilization, 0.01, 1.0, float)
        for name in ("skip_tokenizer_init", "enable_prefix_caching", "enable_chunked_prefill"):
            check_type(name, getattr(self, name), bool)
        for name in ("async_scheduling", "enforce_eager", "use_tqdm_on_load"):
            check_type(name, getattr(self, name), bool)
