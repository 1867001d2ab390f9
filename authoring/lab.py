"""A JupyterLab of its own and a Chromium to open it in, both gone when the block ends."""

import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCREEN = {"width": 1366, "height": 768}  # pixels, a small laptop
START_SECONDS = 600
QUIET = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    # every cell is in the page from the start, so that all of them can be looked at
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}
DARK = {"@jupyterlab/apputils-extension:themes": {"theme": "JupyterLab Dark"}}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    found = [os.environ.get("COURSE_CHROMIUM"), *map(shutil.which, BROWSERS)]
    return next(filter(None, found), None)


def why_not() -> str | None:
    """Why this machine cannot look at pages; None if it can."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed: pip install -c constraints.txt -e '.[screens]'"
    return None if chromium() else "there is no Chromium on PATH, nor in $COURSE_CHROMIUM"


@contextmanager
def jupyterlab(folder: Path, dark: bool = False) -> Iterator[str]:
    """A server over `folder`, with settings of its own; yields a URL with {workspace}, {path}."""
    token = secrets.token_hex(16)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as home:
        overrides = Path(home, "config/labconfig/default_setting_overrides.json")
        overrides.parent.mkdir(parents=True)
        overrides.write_text(json.dumps(QUIET | (DARK if dark else {})))
        log = Path(home, "log")
        # -P: the working folder's files are no part of JupyterLab
        command = [sys.executable, "-P", "-m", "jupyterlab", "--no-browser", "--allow-root"]
        command += [f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={token}"]
        command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
        with log.open("w") as file:
            server = subprocess.Popen(command, env=own_settings(home), stdout=file, stderr=file)
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token={token}", server, log)
            yield f"http://127.0.0.1:{port}/lab/workspaces/{{workspace}}/tree/{{path}}?token={token}"
        finally:
            server.terminate()
            server.wait(timeout=300)


def own_settings(home: str) -> dict[str, str]:
    """The environment that keeps the user's Jupyter settings, trust and workspaces out of this."""
    names = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    }
    return os.environ | {name: os.path.join(home, part) for name, part in names.items()}


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


@contextmanager
def browser() -> Iterator[Any]:
    """A page of Chromium at the size of a laptop's screen."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium())
        try:
            yield started.new_page(viewport=SCREEN)
        finally:
            started.close()
