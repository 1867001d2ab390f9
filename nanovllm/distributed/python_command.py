"""Start Python processes that run this process's code, and say which code a process runs.

A new interpreter does not import what its parent imported. `python -c` and `python -m` put the
working folder first on `sys.path`, so that a file named json.py there replaces the standard
library's, and the new process knows nothing of the entries that its parent added while it ran.
"""

import os
import platform
import sys
from dataclasses import asdict
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import nanovllm

# What the new process runs first: nothing may be imported before sys.path is the parent's.
PREAMBLE = """\
import sys
sys.path[:] = {path!r}
from importlib.machinery import PathFinder
class Pinned:
    folders = {folders!r}
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return PathFinder.find_spec(name, [cls.folders[name]]) if name in cls.folders else None
sys.meta_path.insert(0, Pinned)
"""
COMPUTING = ("numpy", "safetensors", "tokenizers", "torch", "transformers", "triton")
MAY_DIFFER = {"device", "use_tqdm_on_load"}  # between the arguments of two ranks of one engine


def python_command(code: str) -> list[str]:
    """Return the command that runs `code` in a new process with this process's imports.

    The new process gets this process's `sys.path` as it is now, without the empty entry, which
    means the working folder. Modules that this process has from elsewhere come from there.

    Append arguments to the command as usual; they arrive in `sys.argv[1:]`.
    """
    path = [os.path.abspath(entry) for entry in sys.path if entry]
    # -P keeps the working folder off sys.path from the start, before the preamble runs.
    flag = "-I" if sys.flags.isolated else "-P"
    preamble = PREAMBLE.format(path=path, folders=folders_off(path))
    return [sys.executable, flag, "-c", preamble + code]


def folders_off(path: list[str]) -> dict[str, str]:
    """Return the folder, by name, of each imported module that a search of `path` would not find.

    A search would find nothing, or another file, where this process has imported the module
    through the empty entry of `sys.path` or through an editable installation's own finder, and
    where `sys.path` has changed since. Submodules are not listed: their package knows its folder.
    """
    folders = {}
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        if spec is None or spec.name != name or "." in name or not spec.has_location:
            continue
        found = PathFinder.find_spec(name, path)
        if found is None or found.origin != spec.origin:
            folder = os.path.dirname(os.path.abspath(spec.origin))
            is_package = spec.submodule_search_locations is not None
            folders[name] = os.path.dirname(folder) if is_package else folder
    return folders


def facts_of(folder: Path, config: Any, args: Any) -> dict[str, str]:
    """Return what all ranks of one engine must have in common, by name.

    These are the code (where nanovllm and torch were imported from, and the versions of what
    computes), the model's folder, and every field of the dataclasses `config` and `args`.
    """
    facts = {
        "nanovllm": os.path.realpath(nanovllm.__path__[0]),
        "torch": os.path.realpath(torch.__path__[0]),
        "Python's version": platform.python_version(),
        "model": str(folder.resolve()),
    }
    for package in COMPUTING:
        try:
            facts[f"{package}'s version"] = version(package)
        except PackageNotFoundError:
            continue
    fields = {**asdict(config), **asdict(args), "model": facts["model"]}
    return {name: str(v) for name, v in (facts | fields).items() if name not in MAY_DIFFER}
