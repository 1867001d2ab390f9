"""Load a model's tokenizer, and turn the tokenizers library's failures into useful errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanovllm.checkpoint.hub import find_model
from nanovllm.config import EngineArgs


def load_tokenizer(args: EngineArgs, folder: Path) -> Any:
    """Return the tokenizer in `folder`, or the one that args.tokenizer names.

    Python code in the folder is never run. Raises ValueError if no tokenizer can be read.
    """
    from transformers import AutoTokenizer  # this import takes a second, and not every use needs it

    if args.tokenizer is not None:
        folder = find_model(args.tokenizer, None, role="tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # transformers makes up such a tokenizer where there are no files.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError("it has only special tokens; is tokenizer.json missing?")
    except BaseException as error:  # transformers raises many kinds
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise ValueError(
            f"no tokenizer could be read from {args.tokenizer or args.model!r} "
            f"({explain_load_error(error)}); name another folder with tokenizer=, or use "
            f"skip_tokenizer_init=True to work without a tokenizer"
        ) from error
    return tokenizer


def explain_load_error(error: BaseException) -> str:
    """Return why a tokenizer could not be loaded, in words for the user of this engine."""
    if is_panic(error):
        return f"its tokenizer.json is damaged: {error}"
    # transformers would advise to set trust_remote_code=True, which this engine refuses.
    if "trust_remote_code" in str(error):
        return "it needs its own Python code, and this engine never runs a model's code"
    return str(error)


@contextmanager
def tokenizer_errors(source: Any) -> Iterator[None]:
    """Turn an error of the tokenizers library into a ValueError that names `source`.

    A damaged tokenizer.json can load without an error and fail later. The library then raises a
    bare Exception or a panic. Other exceptions, such as KeyboardInterrupt, pass unchanged.
    """
    try:
        yield
    except BaseException as error:
        if not (type(error) is Exception or is_panic(error)):
            raise
        raise ValueError(
            f"the tokenizer of {str(source)!r} failed: {error}. Its tokenizer.json is probably "
            f"damaged; download it again, or name another folder with tokenizer="
        ) from error


def is_panic(error: BaseException) -> bool:
    """Return whether Rust code has panicked.

    We compare the name, because Python cannot import the class. It is not a subclass of Exception.
    """
    return type(error).__name__ == "PanicException"
