"""The kinds of prompts that `LLM` and `LLMEngine` accept, under vLLM's names.

    llm.generate(TokensPrompt(prompt_token_ids=[1, 2, 3]))  # or {"prompt_token_ids": [1, 2, 3]}

vLLM's prompts have further keys. This engine has no use for them, so it accepts only None there.
"""

from typing import Any, NotRequired, TypeAlias, TypedDict


class PromptOptions(TypedDict):
    """Keys that both kinds of prompts may have in vLLM. This engine accepts only None."""

    multi_modal_data: NotRequired[None]
    mm_processor_kwargs: NotRequired[None]
    multi_modal_uuids: NotRequired[None]
    cache_salt: NotRequired[None]


class TextPrompt(PromptOptions):
    """A prompt as text. The engine tokenizes it."""

    prompt: str


class TokensPrompt(PromptOptions):
    """A prompt as token ids. If it also has a text, outputs show this text."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    token_type_ids: NotRequired[None]


PromptType: TypeAlias = str | list[int] | TextPrompt | TokensPrompt
PROMPT_KEYS = (TextPrompt.__annotations__ | TokensPrompt.__annotations__).keys()


def parse_prompt(prompt: Any) -> dict[str, Any]:
    """Return a prompt of any kind as a dict of "prompt" and "prompt_token_ids".

    One of the two values may be None. Raises ValueError for an unknown key, and for a key of vLLM
    that has another value than None.
    """
    if not isinstance(prompt, dict):
        prompt = {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
    read = ("prompt", "prompt_token_ids")
    unset = {key for key, value in prompt.items() if key in PROMPT_KEYS and value is None}
    if unknown := prompt.keys() - unset - {*read}:
        raise ValueError(f"a prompt has 'prompt' or 'prompt_token_ids', not {unknown}")
    return {key: prompt.get(key) for key in read}
