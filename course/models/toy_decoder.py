"""A model of one layer that only decodes: what lesson 07's exercises capture.

    model = ToyDecoder(rows=8)
    next_ids = model(ids, positions)      # one token a row, [n] int64 each; n at most `rows`

It asks the device for nothing, so that a step of it can be captured. `padding` says how many rows
are added to a batch, so that it has a captured size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

VOCABULARY, SIZE, LONGEST = 97, 16, 32


def padding(sizes: Sequence[int], batch: int) -> int | None:
    """Rows that a batch is padded with: up to the smallest size that holds it; None: none does."""
    fitting = [size for size in sizes if size >= batch]
    return min(fitting) - batch if fitting else None


class ToyDecoder:
    """Row i of a batch has row i of the cache. A row with position -1 stores nothing in it."""

    def __init__(self, rows: int, device: torch.device | str = "cpu"):
        random = torch.Generator().manual_seed(7)

        def weight(*shape: int) -> Tensor:  # float64: the same ids in every batch size
            numbers = torch.randn(*shape, generator=random, dtype=torch.float64)
            return (numbers * shape[-1] ** -0.5).to(device)

        self.embedding = weight(VOCABULARY, SIZE) * 4
        self.key, self.value, self.query = weight(3, SIZE, SIZE)
        self.head = weight(SIZE, VOCABULARY) * 4
        # One place more than a context: there the rows write that have nothing to store.
        self._cache = torch.zeros(2, rows, LONGEST + 1, SIZE, dtype=torch.float64, device=device)
        self._places = torch.arange(LONGEST + 1, device=device)
        self._rows = torch.arange(rows, device=device)
        self.calls = 0  # how often Python came by

    @property
    def stored(self) -> Tensor:
        """Keys and values: [2, rows, LONGEST, SIZE]."""
        return self._cache[:, :, :LONGEST]

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The next id of each row: stores its key and value at `positions`, and attends."""
        self.calls += 1
        rows, x = self._rows[: len(ids)], self.embedding[ids]
        places = torch.where(positions < 0, LONGEST, positions)
        self._cache[0, rows, places] = x @ self.key
        self._cache[1, rows, places] = x @ self.value
        keys, values = self._cache[:, : len(ids)]
        scores = (keys @ (x @ self.query)[:, :, None]).squeeze(2)  # [n, LONGEST + 1]
        scores = scores.masked_fill(self._places > positions.clamp(min=0)[:, None], -1e9)
        mixed = scores.softmax(1)[:, None] @ values
        return ((x + mixed.squeeze(1)) @ self.head).argmax(1)
