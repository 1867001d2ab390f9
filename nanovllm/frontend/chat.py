"""Turn conversations into text with a chat template.

A conversation is a list of messages, and a message is a dict with a role and a content. The chat
template is a program in the Jinja language that comes with the tokenizer. It writes each message
between the special tokens that the model has learned.
"""

import os
from pathlib import Path
from typing import Any

from nanovllm.validation import check_type, check_unicode


def apply_chat_template(conversation: list, options: dict[str, Any], tokenizer: Any) -> str:
    """Return the text of a conversation.

    options: the arguments of tokenizer.apply_chat_template. `chat_template` is None for the
    tokenizer's own template.

    Raises ValueError if the conversation holds anything but messages, or does not fit the template.
    """
    if not (conversation and all(map(is_message, conversation))):
        raise ValueError(
            f"messages={conversation!r:.200} must be dicts with a role and a content of text"
        )
    template = options["chat_template"] or tokenizer.chat_template
    if not template:
        source = getattr(tokenizer, "name_or_path", "")
        raise ValueError(f"model {source!r} has no chat template; pass one with chat_template=")
    if options["tools"] and "tools" not in str(template):
        raise ValueError(
            f"tools={options['tools']!r:.80} would be ignored, because the chat template does not "
            f"use tools; remove them, or pass another chat_template="
        )
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, **options)
    except Exception as error:  # a template is a program, so it may raise anything
        raise ValueError(
            f"messages={conversation!r:.200} do not fit the chat template: {error!r}"
        ) from error
    check_unicode("the chat template's text", text)  # a template can write "\ud800" itself
    return text


def join_text_parts(message: Any) -> Any:
    """Return a message, or a conversation, whose contents are texts and not lists of text parts.

    A text part is {"type": "text", "text": ...}. The texts are joined by line breaks, as in vLLM.
    Contents with other parts stay as they are, and `apply_chat_template` refuses them.
    """
    if isinstance(message, (list, tuple)):
        return [join_text_parts(inner) for inner in message]
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list) or not all(map(is_text_part, parts)):
        return message
    return {**message, "content": "\n".join(part["text"] for part in parts)}


def is_text_part(part: Any) -> bool:
    known = isinstance(part, dict) and set(part) == {"type", "text"}
    return known and part["type"] == "text" and isinstance(part["text"], str)


def is_message(message: Any) -> bool:
    """Return whether this is a dict with a role and with a text as content, or with tool calls."""
    known = isinstance(message, dict) and "role" in message
    return known and (isinstance(message.get("content"), str) or "tool_calls" in message)


def load_chat_template(template: Any) -> str | None:
    """Return a chat template, which is read from a file if `template` is a path.

    Raises TypeError for other types than a str and a path, and ValueError for a file that cannot
    be read.
    """
    if template is None:
        return None
    text = os.fspath(template) if isinstance(template, os.PathLike) else template
    check_type("chat_template", text, str)
    is_template = any(mark in text for mark in "{}\n")  # vLLM's rule to tell a template from a path
    try:
        return text if is_template else Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"chat_template={text!r:.200} is neither a template nor a readable file: {error}"
        ) from error
