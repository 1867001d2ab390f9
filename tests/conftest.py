"""What several test files share. One thread: steady times, and no fight over the cores."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TinyModel
from transformers.utils import logging

from course.rank_threads import record_nothing

torch.set_num_threads(1)
logging.disable_progress_bar()
record_nothing()  # before any test's group: the tests of one process run ranks as threads, too


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_model(family="qwen2", ...) -> the folder of such a model, written once a session."""
    folders: dict[TinyModel, Path] = {}

    def make(**options: Any) -> Path:
        tiny = TinyModel(**options)
        if tiny not in folders:
            folders[tiny] = tiny.write(tmp_path_factory.mktemp(tiny.family))
        return folders[tiny]

    return make


@pytest.fixture(scope="session")
def folder(tiny_model: Callable[..., Path]) -> str:
    """The folder of a tiny Qwen3, which most tests of the engine run."""
    return str(tiny_model(family="qwen3"))


@pytest.fixture(autouse=True)
def no_figure_stays_open() -> Iterator[None]:
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")
