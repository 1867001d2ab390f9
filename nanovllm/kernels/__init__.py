"""Triton kernels, one file a topic, each next to the function that launches it."""
