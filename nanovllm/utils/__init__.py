"""Where scripts written for vLLM look for the parser of their command line."""

from nanovllm.utils.argparse_utils import FlexibleArgumentParser

__all__ = ["FlexibleArgumentParser"]
