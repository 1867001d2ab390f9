"""The decoder and its configuration: one model definition serves Qwen3, Qwen2 and Llama."""
