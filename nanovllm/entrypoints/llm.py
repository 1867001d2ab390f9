"""LLM, where scripts written for vLLM may import it from."""

from nanovllm.llm import LLM

__all__ = ["LLM"]
