"""Which model a command runs when none is named, and the same answer for everyone who asks."""

import os
from pathlib import Path

from course.smollm2 import smollm2_dir

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"


def pick_model(named: str | None = None) -> str:
    """A model's folder or Hugging Face id: the one named, else $MODEL, else the course's own.

    The course's own is the first folder in checkpoints/ that holds a config.json; without one it
    is SmolLM2-135M-Instruct, converted into the user's cache on first use.
    """
    if chosen := named or os.environ.get("MODEL"):
        return chosen
    for config in sorted(CHECKPOINTS.glob("*/config.json")):
        return str(config.parent)
    return str(smollm2_dir())
