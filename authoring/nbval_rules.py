"""Hooks for pytest with nbval: skip by what a notebook requires, stop it at its first failure,
and say how long it took. `notebooks/conftest.py` and `solutions/conftest.py` take them from here.
With `--store-outputs`, a notebook of notebooks/ whose cells all pass keeps what this run printed.

Reports on the whole run are made where all results arrive, so they hold under pytest-xdist too.
Limits are of the CPU time that a notebook's kernel takes, which other work on the machine does not
change; what is printed for each cell and notebook is the time that passed.
"""

from collections import defaultdict
from typing import Any

import pytest

from authoring.execute import sign_run
from course.pages.jobs import write_notebook
from course.pages.source import missing_requirement

REPORT_SECONDS = 90  # of CPU time, the course's own limit: above it a lesson is named as slow
REPORT_SOLUTIONS = 20  # the same for the solutions of a lesson's exercises
# Another processor can take twice as long, and no timing is asserted tightly: only above this the
# run fails, since then something computes what it should not.
FAIL_SECONDS = 180
CPU = "kernel's CPU seconds"  # its name among a report's properties, which xdist sends along
SLOWEST = 10
REPORTED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = "store what each notebook that passes prints, as `authoring.build --run` does"
    parser.addoption("--store-outputs", action="store_true", help=help_text)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons: dict[Any, str | None] = {}
    for item in items:
        notebook_file = item.parent
        if notebook := getattr(notebook_file, "nb", None):
            if notebook_file not in reasons:
                reasons[notebook_file] = missing_requirement(notebook)
            if reason := reasons[notebook_file]:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if failed := getattr(item.parent, "failed_at", None):
        pytest.skip(f"stopped at this notebook's first failure, {failed}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    report = yield
    if call.when == "call" and (kernel := getattr(item.parent, "kernel", None)):
        report.user_properties.append((CPU, cpu_seconds_of(kernel)))
    if report.failed and not hasattr(item.parent, "failed_at"):
        item.parent.failed_at = item.name
    return report


def cpu_seconds_of(kernel: Any) -> float:
    """CPU seconds that a kernel and its finished children have taken since it began."""
    import psutil

    try:
        return sum(psutil.Process(kernel.km.provisioner.pid).cpu_times()[:4])
    except (psutil.Error, AttributeError):  # it has ended, or never began
        return 0.0


def seconds_by_notebook(durations: dict[str, float]) -> dict[str, float]:
    """Seconds a cell, by node id -> seconds a notebook, in the order of their names."""
    total: dict[str, float] = defaultdict(float)
    for node, seconds in durations.items():
        total[node.partition("::")[0]] += seconds
    return dict(sorted(total.items()))


def too_slow(cpu: dict[str, float], limit: float) -> list[str]:
    return [name for name, seconds in cpu.items() if seconds > limit]


def report_lines(durations: dict[str, float], cpu: dict[str, float]) -> list[str]:
    """The slowest cells, then every notebook's seconds, the slow ones named as such.

    durations: seconds that passed, by cell. cpu: CPU seconds, by notebook.
    """
    slowest = sorted(durations.items(), key=lambda pair: -pair[1])[:SLOWEST]
    lines = [f"{seconds:7.1f} s  {node}" for node, seconds in slowest]
    lines.append("")
    for name, seconds in seconds_by_notebook(durations).items():
        limit = REPORT_SOLUTIONS if name.startswith("solutions/") else REPORT_SECONDS
        used = cpu.get(name, 0.0)
        note = f"  SLOW: {used:.0f} s of CPU time, over {limit} s" if used > limit else ""
        if used > FAIL_SECONDS:
            note = f"  FAILED: {used:.0f} s of CPU time, over {FAIL_SECONDS} s"
        lines.append(f"{seconds:7.1f} s  {name}{note}")
    return lines


def durations_of(config: pytest.Config) -> dict[str, float]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    durations: dict[str, float] = defaultdict(float)
    for reports in reporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                durations[report.nodeid] += report.duration
    return durations


def cpu_of(config: pytest.Config) -> dict[str, float]:
    """CPU seconds of each notebook's kernel, at the end of its last cell."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    cpu: dict[str, float] = defaultdict(float)
    for reports in reporter.stats.values():
        for report in reports:
            name = getattr(report, "nodeid", "").partition("::")[0]
            used = dict(getattr(report, "user_properties", [])).get(CPU, 0.0)
            cpu[name] = max(cpu[name], used)
    return cpu


def is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def store_outputs(items: list[pytest.Item]) -> None:
    """Write each notebook that ran whole, with this run's outputs and execution counts.

    nbval puts all that a cell writes to stdout in one place, and likewise to stderr.
    """
    cells: dict[Any, list[Any]] = defaultdict(list)
    for item in items:
        if hasattr(item.parent, "nb"):
            cells[item.parent].append(item)
    for notebook_file, run in cells.items():
        num_cells = sum(cell.cell_type == "code" for cell in notebook_file.nb.cells)
        whole = len(run) == num_cells and all(c.test_outputs is not None for c in run)
        if hasattr(notebook_file, "failed_at") or not whole:
            continue
        for count, item in enumerate(run, start=1):
            item.cell.outputs, item.cell.execution_count = item.test_outputs, count
        sign_run(notebook_file.nb)
        write_notebook(notebook_file.nb, notebook_file.path)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--store-outputs", default=False):
        store_outputs(session.items)
    if not is_worker(session.config) and too_slow(cpu_of(session.config), FAIL_SECONDS):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash.get(REPORTED, False):  # by the other folder's conftest
        return
    config.stash[REPORTED] = True
    terminalreporter.section(f"the {SLOWEST} slowest cells, and each notebook")
    for line in report_lines(durations_of(config), cpu_of(config)):
        terminalreporter.write_line(line)
