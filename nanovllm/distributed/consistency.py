"""Check that all ranks of an engine run the same code with the same model and arguments.

Ranks never send each other schedules. Each rank computes its own, so two ranks that differ would
silently compute different steps and wait for each other without end.
"""

import os
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nanovllm.distributed.ranks import Ranks

ENGINE_FOLDER = Path(__file__).resolve().parents[1]
NUMERIC_PACKAGES = ("numpy", "safetensors", "tokenizers", "torch", "transformers", "triton")
RANK_LOCAL_ARGUMENTS = {"device", "use_tqdm_on_load"}  # these may differ between two ranks


def collect_facts(folder: Path, config: Any, args: Any) -> dict[str, str]:
    """Return what all ranks of one engine must have in common, by name.

    These facts are the code (the folders that nanovllm and torch were imported from, and the
    versions of the packages that compute), the model's folder, and every field of the dataclasses
    `config` and `args`.
    """
    facts = {
        "nanovllm": str(ENGINE_FOLDER),
        "torch": os.path.realpath(torch.__path__[0]),
        "Python's version": platform.python_version(),
        "model": str(folder.resolve()),
    }
    for package in NUMERIC_PACKAGES:
        try:
            facts[f"{package}'s version"] = version(package)
        except PackageNotFoundError:
            continue
    fields = {**asdict(config), **asdict(args), "model": facts["model"]}
    every = (facts | fields).items()
    return {name: str(value) for name, value in every if name not in RANK_LOCAL_ARGUMENTS}


def check_facts(ranks: Ranks, facts: dict[str, str]) -> None:
    """Raise RuntimeError on a rank whose facts (see `collect_facts`) differ from rank 0's."""
    if ranks.world_size == 1:
        return
    if ranks.rank == 0:
        ranks.messages.set("facts", facts)
        return
    facts_of_rank0 = ranks.messages.get("facts")
    for name in sorted({*facts, *facts_of_rank0}):
        mine, wanted = facts.get(name), facts_of_rank0.get(name)
        if mine != wanted:
            raise RuntimeError(
                f"rank {ranks.rank} differs from rank 0 in {name}: {mine} in place of {wanted}. "
                "All ranks must run the same code with the same model and arguments"
            )
