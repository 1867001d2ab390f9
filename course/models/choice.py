"""Which model a command or a cell runs when none is named, and the same answer for all who ask.

One variable decides for everything: COURSE_MODEL, a model's folder or Hugging Face id. `make run
MODEL=...` sets it. Without it:

                      on a CPU                      on a GPU
    text_model        the course's own              Qwen3-0.6B if it was downloaded before,
                                                    else the course's own
    measured_model    the course's own              a random model of Qwen3-0.6B's shape

The course's own is the first folder in checkpoints/ that holds a config.json. Only a clone of the
repository has one. Elsewhere a model must be named, because another model in its place would give
other answers and other numbers without a word.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from course.clone import ROOT
from course.models.random_model import FOLDER as RANDOM
from course.models.random_model import random_model_dir
from course.models.smollm2 import cache_dir

CHECKPOINTS = ROOT / "checkpoints"
VARIABLE = "COURSE_MODEL"
GPU_MODEL = "Qwen/Qwen3-0.6B"


@dataclass(frozen=True)
class ModelChoice:
    """A model and what to say of it: LLM(choice.path), print(choice)."""

    path: str  # a folder or a Hugging Face id
    says: str

    def __str__(self) -> str:
        return self.says


def pick_model(named: str | None = None) -> str:
    """A model's folder or Hugging Face id: the one named, else $COURSE_MODEL, else the course's."""
    return os.path.expanduser(named) if named else chosen_model() or str(own_model())


def chosen_model() -> str | None:
    """What COURSE_MODEL says, with a leading `~` as the user's home; None if it says nothing."""
    return os.path.expanduser(os.environ.get(VARIABLE) or "") or None


def own_model() -> Path:
    """The folder of the course's own model. FileNotFoundError where it is not there."""
    for config in sorted(CHECKPOINTS.glob("*/config.json")):
        return config.parent
    raise FileNotFoundError(
        "no model is named, and the course's own comes only with a clone of its repository; "
        f"name a model's folder or Hugging Face id with --model or {VARIABLE}"
    )


def text_model() -> ModelChoice:
    """For cells whose text is read. Nothing is downloaded unless COURSE_MODEL asks for it."""
    if chosen := chosen_model():
        return ModelChoice(chosen, f"Text: {Path(chosen).name}, named by {VARIABLE}.")
    if has_gpu() and is_downloaded(GPU_MODEL):
        return ModelChoice(GPU_MODEL, f"Text: {GPU_MODEL}.")
    folder = own_model()
    return ModelChoice(str(folder), f"Text: {folder.name}, the course's own model.")


def measured_model(make: bool = True) -> ModelChoice:
    """For cells that measure: on a GPU the model that is the same for everybody.

    make: write the random model if it is not there yet; otherwise it is only named.
    """
    if not has_gpu() or chosen_model():
        choice = text_model()
        return ModelChoice(choice.path, choice.says.replace("Text:", "Measured:"))
    says = "Measured: a random model of Qwen3-0.6B's shape. It is as fast; its text means nothing."
    folder = random_model_dir() if make else cache_dir() / RANDOM
    return ModelChoice(str(folder), says)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def is_downloaded(model: str) -> bool:
    """Whether a Hugging Face id is in this machine's cache; asks nobody."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot_download(model, local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    return True
