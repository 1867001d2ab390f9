"""EngineArgs, where scripts written for vLLM may import it from."""

from nanovllm.config import EngineArgs

__all__ = ["EngineArgs"]
