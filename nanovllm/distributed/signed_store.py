"""Sign the messages between ranks, so that no other process can command them.

Any process on this machine can connect to the port of torch's TCPStore, whichever user runs it,
because the store asks for no password. We therefore sign every message with a secret key that only
the ranks of one engine know. This key is called the *token*.
"""

import hmac
import json
from typing import Any

import torch.distributed as dist

SIGNATURE_LENGTH = 64  # characters


class SignedStore:
    """A key-value store that accepts only values which were written with this engine's token.

    A signature covers the key and the value. The key holds the receiver's rank and the message's
    number, and each engine has its own token. Another process can therefore neither make up a
    message nor change one. It cannot repeat a message either, be it later, to another rank or to
    another engine.

    The token does not protect against everything:

    - It hides nothing. Every process on this machine can read the messages, including prompts.
    - It does not keep another process from deleting or overwriting a message. The engine then ends
      with an error, but it never carries out a foreign command.
    - It does not cover what torch itself writes to the store (the addresses at which the ranks of
      a process group meet), nor the connections of gloo and NCCL, which carry the tensors.
    - Processes of the same user can find it out, because they may read this process's memory.

    Under torchrun the store belongs to torchrun, whose processes share no secret that this engine
    could use. The token is then empty, and a wrong signature only shows that a value is damaged.

    `store` may be None for an engine of one rank, which sends no messages.
    """

    def __init__(self, store: dist.Store | None, token: str = ""):
        self._store, self.token = store, token

    @property
    def store(self) -> dist.Store:
        """The store below. RuntimeError if there is none, because the engine has one rank."""
        if self._store is None:
            raise RuntimeError("this rank was made without a store, so it can send no messages")
        return self._store

    def set(self, key: str, value: Any) -> None:
        """Write a value, which can be anything that JSON can hold."""
        text = json.dumps(value)
        self.store.set(key, self.sign(key, text) + text)

    def get(self, key: str) -> Any:
        """Wait for a value. Raises RuntimeError if it was not written with this engine's token."""
        signed = self.store.get(key)
        signature, encoded = signed[:SIGNATURE_LENGTH], signed[SIGNATURE_LENGTH:]
        text = encoded.decode(errors="replace")
        if not hmac.compare_digest(signature, self.sign(key, text).encode()):
            raise RuntimeError(
                f"the message {key!r} in the store of the ranks does not carry this engine's "
                "token. Another process has written it, so it is refused"
            )
        return json.loads(text)

    def pop(self, key: str) -> Any:
        """Wait for a value as `get` does, delete it from the store, and return it."""
        value = self.get(key)
        self.store.delete_key(key)
        return value

    def has(self, *keys: str) -> bool:
        """Return whether the store holds all these keys, without waiting for them."""
        return self.store.check(list(keys))

    def sign(self, key: str, text: str) -> str:
        """Return the signature of a key and its value, as 64 hexadecimal digits."""
        return hmac.digest(self.token.encode(), f"{key}\0{text}".encode(), "sha256").hex()
