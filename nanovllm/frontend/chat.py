"""Conversations as text: what a chat template makes of a list of messages.

A message is a dict with a role and a content. The template, a program in the language jinja, comes
with the tokenizer, and writes each message between the marks that the model has learned.
"""

import os
from pathlib import Path
from typing import Any

from nanovllm.validation import check_type, check_unicode


def render(conversation: list, options: dict[str, Any], tokenizer: Any) -> str:
    """The text that the chat template makes of a conversation.

    options: what the template gets, and chat_template, which is None for the tokenizer's own.
    Raises ValueError for a conversation that is none, or that does not fit the template.
    """
    if not (conversation and all(map(is_message, conversation))):
        raise ValueError(
            f"messages={conversation!r:.200} must be dicts with a role and a content of text"
        )
    template = options["chat_template"] or tokenizer.chat_template
    if not template:
        source = getattr(tokenizer, "name_or_path", "")
        raise ValueError(f"model {source!r} has no chat template; pass chat_template=")
    if options["tools"] and "tools" not in str(template):
        raise ValueError(
            f"tools={options['tools']!r:.80} would be ignored: the chat template names no tools"
        )
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, **options)
    except Exception as error:  # a template is a program, and may raise anything
        raise ValueError(
            f"messages={conversation!r:.200} do not fit the chat template: {error!r}"
        ) from error
    check_unicode("the chat template's text", text)  # a template can write "\ud800" itself
    return text


def join_parts(message: Any) -> Any:
    """A message, or a conversation, whose content may be a list of {"type": "text", "text": ...}.

    The texts become one, joined by line ends as in vLLM. Other parts stay, and are refused later.
    """
    if isinstance(message, (list, tuple)):
        return [join_parts(inner) for inner in message]
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list) or not all(map(is_text, parts)):
        return message
    return {**message, "content": "\n".join(part["text"] for part in parts)}


def is_text(part: Any) -> bool:
    known = isinstance(part, dict) and set(part) == {"type", "text"}
    return known and part["type"] == "text" and isinstance(part["text"], str)


def is_message(message: Any) -> bool:
    """Whether it has a role, and a content of text: parts of other kinds no template here takes."""
    known = isinstance(message, dict) and "role" in message
    return known and (isinstance(message.get("content"), str) or "tool_calls" in message)


def read_template(template: Any) -> str | None:
    """A chat template, from its file if it names one. TypeError or ValueError for neither."""
    if template is None:
        return None
    text = os.fspath(template) if isinstance(template, os.PathLike) else template
    check_type("chat_template", text, str)
    is_template = any(mark in text for mark in "{}\n")  # as vLLM tells a template from a path
    try:
        return text if is_template else Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"chat_template={text!r:.200} is neither a template nor a file to read: {error}"
        ) from error
