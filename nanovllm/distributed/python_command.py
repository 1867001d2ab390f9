"""Start Python processes that import the same files as this process.

A new interpreter does not always import what its parent imported. `python -c` and `python -m` put
the working folder first on `sys.path`, so a file named json.py there replaces the standard
library's json. The new process also does not know the entries that its parent added to `sys.path`
while it ran.
"""

import os
import sys
from importlib.machinery import PathFinder

# The new process runs this first, because nothing may be imported before sys.path is the parent's.
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


def python_command(code: str) -> list[str]:
    """Return the command that runs `code` in a new process with this process's imports.

    The new process gets this process's present `sys.path` without the empty entry, which stands
    for the working folder. A module that this process has imported from a folder outside of
    `sys.path` is pinned to that folder.

    Append arguments to the command as usual. They arrive in `sys.argv[1:]`.
    """
    path = [os.path.abspath(entry) for entry in sys.path if entry]
    # -P keeps the working folder off sys.path even before the preamble runs.
    flag = "-I" if sys.flags.isolated else "-P"
    preamble = PREAMBLE.format(path=path, folders=pinned_folders(path))
    return [sys.executable, flag, "-c", preamble + code]


def pinned_folders(path: list[str]) -> dict[str, str]:
    """Return the folder of each imported module, by name, that a search of `path` would not find.

    A search finds nothing, or another file, in three cases: this process has imported the module
    through the empty entry of `sys.path`, it has imported it through an editable installation's
    own finder, or `sys.path` has changed since. We do not list submodules, because their package
    knows its folder.
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
