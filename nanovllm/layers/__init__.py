"""Layers in plain PyTorch, which define the correct result, and the choice of a backend."""
