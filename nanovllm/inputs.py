"""What a prompt may be: the types that scripts for vLLM name, for the dicts that `LLM` takes.

    llm.generate(TokensPrompt(prompt_token_ids=[1, 2, 3]))  # or {"prompt_token_ids": [1, 2, 3]}

Options that this engine has no use for may be there as None; others are refused by name.
"""

from typing import Any, NotRequired, TypeAlias, TypedDict


class PromptOptions(TypedDict):
    """What either kind of prompt may carry in vLLM. Only None is taken here."""

    multi_modal_data: NotRequired[None]
    mm_processor_kwargs: NotRequired[None]
    multi_modal_uuids: NotRequired[None]
    cache_salt: NotRequired[None]


class TextPrompt(PromptOptions):
    """A prompt as text, which the engine tokenizes."""

    prompt: str


class TokensPrompt(PromptOptions):
    """A prompt as token ids. If its text is given too, that is shown and not tokenized."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    token_type_ids: NotRequired[None]


PromptType: TypeAlias = str | list[int] | TextPrompt | TokensPrompt
OPTIONS = (TextPrompt.__annotations__ | TokensPrompt.__annotations__).keys()


def as_prompt(prompt: Any) -> dict[str, Any]:
    """A prompt of any kind as a dict of "prompt" and "prompt_token_ids"; one may be None.

    Raises ValueError for a key that stands for something else, unless its value is None.
    """
    if not isinstance(prompt, dict):
        prompt = {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
    known = ("prompt", "prompt_token_ids")
    unknown = {k for k, v in prompt.items() if k not in known and not (k in OPTIONS and v is None)}
    if unknown:
        raise ValueError(f"a prompt has 'prompt' or 'prompt_token_ids', not {unknown}")
    return {name: prompt.get(name) for name in known}
