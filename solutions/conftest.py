"""Rules for `pytest --nbval-lax solutions`, see authoring/nbval_rules.py."""

from authoring.nbval_rules import (  # noqa: F401
    pytest_collection_modifyitems,
    pytest_runtest_makereport,
    pytest_runtest_setup,
    pytest_sessionfinish,
    pytest_terminal_summary,
)
