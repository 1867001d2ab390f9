"""Processes that are started run the code of the process that starts them, and ranks check it."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from course.processes import module_command, spawned_safely
from course.rank_threads import on_ranks
from nanovllm import EngineArgs
from nanovllm.checkpoint.config_json import read_model_config
from nanovllm.distributed.consistency import check_facts, collect_facts
from nanovllm.distributed.python_command import pinned_folders, python_command
from nanovllm.engine.arg_utils import resolve_args

ROOT = Path(__file__).resolve().parents[2]
NOTES_WHERE = """
import os
with open(os.environ["SEEN"], "a") as file:
    print(os.getpid(), __file__, file=file)
"""
RUN = """
with LLM(sys.argv[1], tensor_parallel_size=2, max_model_len=64, use_tqdm_on_load=False) as llm:
    llm.generate([[1, 2, 3]], use_tqdm=False)
"""
PARENTS = {
    "sys.path extended at run time": "import sys; sys.path.insert(0, sys.argv[2])\n"
    "from nanovllm import LLM" + RUN,
    "the working folder, left since": "import os, sys; os.chdir(sys.argv[2])\n"
    "from nanovllm import LLM; os.chdir(sys.argv[3])" + RUN,
    "another copy first on sys.path since": "import sys; sys.path.insert(0, sys.argv[2])\n"
    "from nanovllm import LLM; sys.path.insert(0, sys.argv[3])" + RUN,
}


@pytest.fixture
def copy(tmp_path):
    """A folder with a copy of nanovllm that notes who imports it."""
    shutil.copytree(ROOT / "nanovllm", tmp_path / "copy" / "nanovllm")
    with (tmp_path / "copy" / "nanovllm" / "__init__.py").open("a") as file:
        file.write(NOTES_WHERE)
    return tmp_path / "copy"


@pytest.fixture
def hostile(tmp_path):
    """A folder whose files have the names of modules that workers import."""
    folder = tmp_path / "hostile"
    (folder / "nanovllm").mkdir(parents=True)
    for name in ("json.py", "random.py", "signal.py", "torch.py", "nanovllm/__init__.py"):
        (folder / name).write_text("import os; os._exit(66)")
    return folder


def clean(**variables):
    """This environment without the variables that choose what Python imports."""
    left = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return left | {"OMP_NUM_THREADS": "1"} | variables


@pytest.mark.parametrize("parent", PARENTS.values(), ids=PARENTS)
def test_rank_1_runs_rank_0s_copy_whatever_lies_in_the_working_folder(
    parent, copy, hostile, tiny_model, tmp_path
):
    seen = tmp_path / "seen"
    start = "import json, random, signal, torch\n"  # from where they should come from
    code = start + "import os; os.chdir(os.environ['HOSTILE'])\n" + parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_model(family="qwen3")), str(copy), str(hostile)],
        env=clean(SEEN=str(seen), HOSTILE=str(hostile)),
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in seen.read_text().splitlines()]
    assert len({pid for pid, _ in lines}) == 2, "rank 0 and rank 1"
    assert {file for _, file in lines} == {str(copy / "nanovllm" / "__init__.py")}


def run_python(code, cwd, **variables):
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=cwd, env=clean(**variables), check=True, capture_output=True, text=True
    )
    return done.stdout.split()


def test_a_package_in_a_zip_file_is_found(tmp_path):
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as file:
        file.writestr("packed/__init__.py", "where = __file__")
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path / "app.zip")!r})
import packed, subprocess
sys.path.insert(0, {str(ROOT)!r})
from nanovllm.distributed.python_command import python_command
sys.path[:] = [p for p in sys.path if not p.endswith(".zip") or "python" in p]
subprocess.run(python_command("import packed; print(packed.where)"), check=True)
"""
    assert run_python(code, tmp_path) == [str(tmp_path / "app.zip/packed/__init__.py")]


def test_a_relative_entry_of_sys_path_means_what_it_means_here(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "found_here.py").write_text("print('found')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["lib", "", *sys.path])
    command = python_command("import found_here, sys; assert '' not in sys.path, sys.path")
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "found\n"


def test_a_module_that_this_process_never_imported_comes_from_no_working_folder(
    tmp_path, monkeypatch
):
    (tmp_path / "colorsys.py").write_text("import os; os._exit(66)")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    subprocess.run(python_command("import colorsys"), check=True)


def test_arguments_follow_the_code():
    command = [*python_command("print(sys.argv[1:])"), "a", "b c"]
    assert subprocess.run(command, check=True, capture_output=True).stdout == b"['a', 'b c']\n"


def test_a_module_is_run_as_a_command_from_this_copy(hostile, tmp_path):
    """As course.models.random_model is, whose process would import the working folder's json.py."""
    command = module_command("course.models.random_model", "--help")
    done = subprocess.run(command, cwd=hostile, capture_output=True, text=True, check=True)
    assert "random_model" in done.stdout
    assert str(ROOT) in " ".join(command)


SPAWNS = """
import sys; sys.path.insert(0, {root!r})
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from course.processes import spawned_safely
import os
if __name__ == "__main__":
    os.chdir({hostile!r})
    with spawned_safely(), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        print(pool.submit(abs, -3).result())
"""


def test_spawned_processes_import_nothing_from_the_working_folder(hostile, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SPAWNS.format(root=str(ROOT), hostile=str(hostile)))
    command = [sys.executable, script]
    done = subprocess.run(command, env=clean(), check=True, capture_output=True, text=True)
    assert done.stdout == "3\n"


@pytest.mark.parametrize("before", [None, "0"])
def test_the_environment_is_as_before(before, monkeypatch):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    if before:
        monkeypatch.setenv("PYTHONSAFEPATH", before)
    with spawned_safely():
        assert os.environ["PYTHONSAFEPATH"] == "1"
    assert os.environ.get("PYTHONSAFEPATH") == before


def test_only_modules_that_a_search_would_miss_are_listed(tmp_path):
    assert pinned_folders([str(ROOT), *sys.path]).get("nanovllm") is None
    without = [entry for entry in sys.path if entry and Path(entry).resolve() != ROOT]
    found = pinned_folders([str(tmp_path), *without])
    assert found["nanovllm"] == found["course"] == str(ROOT)
    assert not {"json", "torch", "sys"} & set(found)
    (tmp_path / "json.py").write_text("")
    assert pinned_folders([str(tmp_path), *sys.path])["json"] == str(Path(json.__file__).parents[1])


# -- what ranks must have in common ----------------------------------------------------------------


@pytest.fixture
def facts(tiny_model):
    folder = tiny_model(family="qwen3")
    config = read_model_config(folder)
    args = EngineArgs(str(folder), device="cpu", max_model_len=64)

    def make(**changes):
        return collect_facts(folder, config, resolve_args(replace(args, **changes), config))

    return make


def test_ranks_with_the_same_facts_go_on(facts):
    on_ranks(3, lambda ranks: check_facts(ranks, facts(use_tqdm_on_load=ranks.rank == 0)))


@pytest.mark.parametrize(
    ("name", "value", "wanted"), [("max_num_seqs", 7, "256"), ("block_size", 32, "16")]
)
def test_ranks_with_other_arguments_are_refused(facts, name, value, wanted):
    def run(ranks):
        check_facts(ranks, facts(**{name: value}) if ranks.rank else facts())

    words = f"rank 1 differs from rank 0 in {name}: {value} in place of {wanted}"
    with pytest.raises(RuntimeError, match=words):
        on_ranks(2, run)


SCRIPT = """
import os, sys
sys.path.insert(0, sys.argv[2 + int(os.environ["RANK"])])
from nanovllm import LLM
LLM(sys.argv[1], tensor_parallel_size=2, max_model_len=64, use_tqdm_on_load=False)
"""


def test_ranks_under_torchrun_that_import_different_copies_are_refused(copy, tiny_model, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, script, tiny_model(family="qwen3"), ROOT, copy],
        env=clean(SEEN=str(tmp_path / "seen")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    words = "rank 1 differs from rank 0 in nanovllm"
    assert f"{words}: {copy}/nanovllm in place of {ROOT}/nanovllm" in done.stderr
