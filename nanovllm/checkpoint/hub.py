"""Find the folder of a model: a local folder, or one that the Hugging Face hub provides."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download

from nanovllm.validation import check_unicode

TOKENIZER_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]


def find_model(model: str, revision: str | None, role: str = "model") -> Path:
    """Return the folder of a model, after downloading it from the Hugging Face hub if necessary.

    model: a local folder, where a leading `~` stands for the user's home, or an id on the hub.
    role: the argument that named the model: "model", or "tokenizer" to download no weights.

    Raises ValueError with advice if the model is neither on this machine nor available.
    """
    local = os.path.expanduser(model)
    if os.path.isdir(local):
        return Path(local)
    if os.path.isfile(local):
        raise ValueError(
            f"{role}={model!r} is a file; give the folder that holds it. A model's folder has "
            f"config.json, *.safetensors and its tokenizer's files; no other format is read."
        )
    check_unicode(role, model)
    patterns = [*TOKENIZER_FILES, "*.safetensors"] if role == "model" else TOKENIZER_FILES
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # offline, unknown, forbidden, or not an id at all
        raise ValueError(
            f"{role}={model!r} is not a local folder, and the Hugging Face hub did not provide it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the name, or download "
            f"it while online; HF_HUB_OFFLINE=1 uses only the local cache."
        ) from error
