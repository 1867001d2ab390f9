"""LLMEngine, where scripts written for vLLM may import it from."""

from nanovllm.llm_engine import LLMEngine

__all__ = ["LLMEngine"]
