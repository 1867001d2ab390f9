"""What `make install` decides, how a moved environment is repaired, and what a wheel carries."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nanovllm
from authoring import moved_venv, torch_build

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def a_fresh_linux(monkeypatch):
    """A Linux machine with nothing installed, no GPU, and a network that reaches every index."""
    for name in ("TORCH", "TORCH_INDEX", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch_build, "installed", lambda: None)
    monkeypatch.setattr(torch_build, "find_gpu", lambda: False)
    monkeypatch.setattr(torch_build, "is_reachable", lambda index: True)
    monkeypatch.setattr(torch_build.platform, "system", lambda: "Linux")


def test_without_a_gpu_torch_is_the_cpus():
    index, says = torch_build.choose()
    assert index == torch_build.CPU_INDEX
    assert "No NVIDIA GPU was found" in says
    assert "TORCH=cuda" in says, "it says how to choose otherwise"


def test_with_a_gpu_torch_is_cudas_and_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(torch_build, "find_gpu", lambda: True)
    monkeypatch.delattr(torch_build, "is_reachable")
    index, says = torch_build.choose()
    assert index == ""
    assert "An NVIDIA GPU was found" in says
    assert "TORCH=cpu" in says


@pytest.mark.parametrize(("gpu", "build"), [(True, "cpu"), (False, "cuda")])
def test_the_user_decides_against_what_was_found(gpu, build, monkeypatch):
    monkeypatch.setattr(torch_build, "find_gpu", lambda: gpu)
    monkeypatch.setenv("TORCH", build)
    index, says = torch_build.choose()
    assert index == (torch_build.CPU_INDEX if build == "cpu" else "")
    assert f"TORCH={build} was given" in says


def test_an_index_that_the_user_names_is_taken_without_a_question(monkeypatch):
    monkeypatch.setenv("TORCH_INDEX", "https://mirror.example/whl/cpu")
    monkeypatch.delattr(torch_build, "is_reachable")
    assert torch_build.choose()[0] == "https://mirror.example/whl/cpu"


def test_an_index_that_cannot_be_reached_is_no_failure(monkeypatch):
    monkeypatch.setattr(torch_build, "is_reachable", lambda index: False)
    index, says = torch_build.choose()
    assert index == ""
    assert "cannot be reached" in says


def test_an_installed_torch_stays_and_nothing_is_asked_again(monkeypatch):
    monkeypatch.setattr(torch_build, "installed", lambda: f"{torch_build.pinned()}+cpu")
    monkeypatch.delattr(torch_build, "is_reachable")
    assert torch_build.choose()[0] == ""


def test_another_version_of_torch_than_the_pinned_is_chosen_for_anew(monkeypatch):
    monkeypatch.setattr(torch_build, "installed", lambda: "2.8.0+cpu")
    assert torch_build.choose()[0] == torch_build.CPU_INDEX


def test_no_index_is_named_where_pip_was_told_to_use_none(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert torch_build.choose()[0] == ""


@pytest.fixture
def a_mac(monkeypatch):
    """Make this machine a Mac with that processor and version of macOS."""

    def become(machine: str, version: str) -> None:
        monkeypatch.setattr(torch_build.platform, "system", lambda: "Darwin")
        monkeypatch.setattr(torch_build.platform, "machine", lambda: machine)
        monkeypatch.setattr(torch_build.platform, "mac_ver", lambda: (version, ("", "", ""), ""))

    return become


@pytest.mark.parametrize("version", ["14.0", "15.6.1", "26.1"])
def test_a_system_with_one_build_has_no_choice(version, a_mac):
    a_mac("arm64", version)
    assert torch_build.choose()[0] == ""


@pytest.mark.parametrize(
    ("machine", "version", "says"),
    [
        ("x86_64", "15.6", "no wheels for Intel Macs"),
        ("arm64", "13.7.8", "needs macOS 14 or later, and this is 13.7.8"),
    ],
)
def test_a_mac_without_wheels_is_told_what_to_do(machine, version, says, a_mac):
    """pip itself says only that it finds no matching distribution."""
    a_mac(machine, version)
    with pytest.raises(ValueError, match=f"{says}.* use Docker, as docs/platforms.md shows"):
        torch_build.choose()


def test_a_mac_without_wheels_may_name_an_index_that_has_some(a_mac, monkeypatch):
    a_mac("x86_64", "15.6")
    monkeypatch.setenv("TORCH_INDEX", "https://mirror.example/whl/cpu")
    assert torch_build.choose()[0] == "https://mirror.example/whl/cpu"


def test_a_build_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("TORCH", "gpu")
    with pytest.raises(ValueError, match="TORCH must be cpu or cuda, got 'gpu'"):
        torch_build.choose()


@pytest.mark.parametrize(
    ("tool", "found"),
    [
        ("echo 'GPU 0: NVIDIA H200'", True),
        ("echo 'NVIDIA-SMI has failed: no driver'; exit 9", False),
        ("echo 'No devices were found'", False),
    ],
)
def test_a_gpu_is_one_that_its_driver_lists(tool, found, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(torch_build, "SIGNS", (str(tmp_path / "no-such-device"),))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{tool}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert torch_build.find_gpu() is found


def test_a_drivers_file_is_a_gpu_as_in_a_container_without_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(torch_build, "SIGNS", (str(tmp_path / "none"), str(tmp_path)))
    assert torch_build.find_gpu()


def test_an_index_is_asked_once_and_not_for_long(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch_build, "SECONDS", 0.01)  # less than Python takes to start
    assert not torch_build.is_reachable("http://127.0.0.1:9")
    monkeypatch.undo()
    assert not torch_build.is_reachable("http://127.0.0.1:9")  # nobody listens there


# -- a moved environment ---------------------------------------------------------------------------


def test_scripts_and_activation_follow_a_moved_environment(tmp_path):
    old = tmp_path / "old"
    base = sys._base_executable
    subprocess.run([base, "-m", "venv", "--without-pip", old], check=True)
    tool = old / "bin" / "tool"
    tool.write_text(f"#!{old}/bin/python3.11\nimport sys\nprint(sys.prefix)\n")
    tool.chmod(0o755)
    in_shell = old / "bin" / "shell-tool"
    head = f"#!/bin/sh\n'''exec' \"{old}/bin/python\" \"$0\" \"$@\"\n' '''\n"
    in_shell.write_text(head + "import sys\nprint(sys.prefix)\n")
    in_shell.chmod(0o755)
    (old / "bin" / "other").write_text("#!/bin/bash\necho hello\n")
    new = old.rename(tmp_path / "a new name")
    assert moved_venv.repair(new) == ["shell-tool", "tool"]
    for script in ("tool", "shell-tool"):
        printed = subprocess.run([new / "bin" / script], capture_output=True, text=True, check=True)
        assert printed.stdout.strip() == str(new)
    assert (new / "bin" / "other").read_text() == "#!/bin/bash\necho hello\n"
    activated = subprocess.run(
        ["bash", "-c", '. "$0/bin/activate" && command -v tool', new],
        capture_output=True,
        text=True,
        check=True,
    )
    assert activated.stdout.strip() == str(new / "bin" / "tool")
    assert moved_venv.repair(new) == [], "a second repair finds nothing"


def test_a_path_that_fits_in_a_first_line_stands_there():
    assert moved_venv.header(b"/clone/.venv/bin/python") == b"#!/clone/.venv/bin/python"
    assert moved_venv.header(b"/" + b"x" * 124) == b"#!/" + b"x" * 124
    assert moved_venv.header(b"/" + b"x" * 125).startswith(b"#!/bin/sh\n")


# -- the wheel -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that `pip install` of the repository makes, from the files that git knows."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "nanovllm", "course", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, tracked.split("\0")):
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    program = f"from setuptools import build_meta; print(build_meta.build_wheel({str(folder)!r}))"
    subprocess.run(
        [sys.executable, "-c", program], cwd=folder / "source", check=True, capture_output=True
    )
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_outside(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the unpacked wheel in place of the clone, in a folder that is no clone."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    environment.pop("COURSE_MODEL", None)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=site.parent,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_the_wheel_names_its_version_and_brings_its_types(wheel, unpacked):
    assert wheel.name.split("-")[1] == nanovllm.__version__
    assert (unpacked / "nanovllm" / "py.typed").exists()
    shown = run_outside(unpacked, "-c", "import nanovllm as n; print(n.__version__, n.__file__)")
    assert shown.stdout.split() == [nanovllm.__version__, str(unpacked / "nanovllm/__init__.py")]


def test_the_readmes_first_script_runs_from_the_wheel_without_the_course(unpacked, tiny_model):
    readme = (ROOT / "README.md").read_text()
    script = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    script = script.replace("checkpoints/storyteller", str(tiny_model()))
    script += "import sys\nassert not [name for name in sys.modules if name.startswith('course')]\n"
    ended = run_outside(unpacked, "-c", script)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("Once upon a time ->")


def test_commands_of_the_wheel_say_that_they_need_a_clone(unpacked):
    ended = run_outside(unpacked, "-m", "course", "progress")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert re.fullmatch(r"course progress: .*a clone of the .*\n", ended.stderr)
