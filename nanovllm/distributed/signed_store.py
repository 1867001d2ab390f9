"""Messages between ranks that carry a proof of where they come from.

Any process of this machine can connect to the port of torch's TCPStore, whoever its user is,
because the store asks for no password. A key that only the ranks of one engine know (the *token*)
therefore signs every message.
"""

import hmac
import json
from typing import Any

import torch.distributed as dist

SIGNATURE = 64  # characters


class SignedStore:
    """A key-value store that accepts only values which were written with this engine's token.

    A signature covers the key and the value. A rank's number and the message's number are part of
    a key, and each engine has a token of its own. So another process can neither make up a
    message, nor change one, nor repeat one: not later, not to another rank, not to another engine.

    What the token does not do:

    - It hides nothing. Every process of this machine can read the messages, prompts included.
    - It keeps nobody from deleting or overwriting a message. The engine then ends with an error,
      but it never does what it was not told.
    - It does not cover what torch itself writes to the store (the addresses at which the ranks of
      a process group meet), nor the connections of gloo and NCCL that tensors travel through.
    - It is no secret from processes of the same user, which may read this process's memory.

    Under torchrun the store is torchrun's, and its processes share no secret that this engine could
    use. The token is empty there, and a signature shows damage only.
    """

    def __init__(self, store: dist.Store, token: str = ""):
        self._store, self.token = store, token

    def set(self, key: str, value: Any) -> None:
        """Write a value: anything that JSON can hold."""
        text = json.dumps(value)
        self._store.set(key, self._sign(key, text) + text)

    def get(self, key: str) -> Any:
        """Wait for a value. RuntimeError if it was not written with this engine's token."""
        signed = self._store.get(key)
        signature, text = signed[:SIGNATURE], signed[SIGNATURE:].decode(errors="replace")
        if not hmac.compare_digest(signature, self._sign(key, text).encode()):
            raise RuntimeError(
                f"the message {key!r} in the store of the ranks does not carry this engine's "
                "token, so another process has written it: it is refused"
            )
        return json.loads(text)

    def take(self, key: str) -> Any:
        """As `get`, and delete the value."""
        value = self.get(key)
        self._store.delete_key(key)
        return value

    def has(self, *keys: str) -> bool:
        """Whether all keys are there, without waiting."""
        return self._store.check(list(keys))

    def _sign(self, key: str, text: str) -> str:
        return hmac.digest(self.token.encode(), f"{key}\0{text}".encode(), "sha256").hex()
