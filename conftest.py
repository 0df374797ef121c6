"""For all tests: files that take long come first, tests marked gpu are skipped on a machine without CUDA, and one that
fails shows what the programs that it started have said."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

SHOWN = 6000
"""Characters of a log, from its end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU; torch is imported only if something does."""
    # Files go to several processes, one after another. The short ones at the end let these finish together.
    long = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in long)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the logs in the folder of a failed test: what it waited for until its time was over may be told there."""
    report = yield
    folder = getattr(item, "funcargs", {}).get("tmp_path")
    if report.failed and isinstance(folder, Path):
        for log in sorted(folder.glob("*.log")):
            text = log.read_text(encoding="utf-8", errors="replace")
            report.sections.append((f"end of {log.name}", text[-SHOWN:]))
    return report
