"""Lay documents into rows of one length, so that no batch has padding to speak of.

No document is cut: each goes into the fullest open row where it still fits. So every row begins
where a document begins, as every prompt will, and later positions are learned from what stands
deep in a row: long chats, long system prompts, and documents behind others.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from checkpoints.storyteller.recipe.chats import Document

OPEN_ROWS = 64
CHUNK = 10_000  # documents tokenized at once


def encode(documents: Iterable[Document], tokenizer: Any) -> Iterator[tuple[list[int], list[bool]]]:
    """Each document's token ids, and which of them are to be learned."""
    chunk: list[Document] = []
    for document in documents:
        chunk.append(document)
        if len(chunk) == CHUNK:
            yield from _encode(chunk, tokenizer)
            chunk = []
    yield from _encode(chunk, tokenizer)


def _encode(chunk: list[Document], tokenizer: Any) -> Iterator[tuple[list[int], list[bool]]]:
    texts = [text for document in chunk for text, _ in document.parts]
    encoded = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    for document in chunk:
        ids: list[int] = []
        learn: list[bool] = []
        for _, learned in document.parts:
            part = next(encoded).ids
            ids += part
            learn += [learned] * len(part)
        yield ids, learn


def pack(
    documents: Iterable[tuple[list[int], list[bool]]], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids [n, length] uint16 padded with 0, and which to learn [n, length] bool.

    Documents longer than a row are left out.
    """
    full: list[tuple[list[int], list[bool]]] = []
    open_rows: list[tuple[list[int], list[bool]]] = []
    for ids, learn in documents:
        if len(ids) > length:
            continue
        fitting = [row for row in open_rows if len(row[0]) + len(ids) <= length]
        if fitting:
            row = max(fitting, key=lambda row: len(row[0]))
        else:
            row = ([], [])
            open_rows.append(row)
        row[0].extend(ids)
        row[1].extend(learn)
        if len(open_rows) > OPEN_ROWS:
            fullest = max(range(len(open_rows)), key=lambda i: len(open_rows[i][0]))
            full.append(open_rows.pop(fullest))
    return _as_arrays(full + open_rows, length)


def _as_arrays(rows: list[tuple[list[int], list[bool]]], length: int) -> tuple[Any, Any]:
    tokens = np.zeros((len(rows), length), dtype=np.uint16)
    learn = np.zeros((len(rows), length), dtype=bool)
    for i, (ids, learned) in enumerate(rows):
        tokens[i, : len(ids)] = ids
        learn[i, : len(ids)] = learned
    return tokens, learn
