"""Rules for the whole run: cheap tests first, the same examples every time, and no skipped test passes."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest

# The same examples on every run, so that a failure belongs to the change and not to the draw. No deadline:
# how long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")

TESTS = Path(__file__).parent
# What fails fastest runs first; a folder that is not named here runs last.
ORDER = ("unit", "sim", "netns", "kube", "kernel")

_skipped: dict[str, str] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the folders by what their tests cost; within a folder the order stays."""
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> int:
    folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
    return ORDER.index(folder) if folder in ORDER else len(ORDER)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a test that skipped itself, or that a mark skipped."""
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped[report.nodeid] = _reason(report.longrepr)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note a whole file that skipped itself."""
    if report.skipped:
        _skipped[report.nodeid] = _reason(report.longrepr)


def _reason(longrepr: object) -> str:
    return str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run that skipped anything has not shown what it claims to."""
    if _skipped and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the skipped tests and what each lacked."""
    if not _skipped:
        return
    terminalreporter.section("skipped tests fail the run", red=True)
    for nodeid, reason in _skipped.items():
        terminalreporter.line(f"{nodeid}: {reason}")
