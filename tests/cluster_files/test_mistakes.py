"""Typical mistakes in a manifest, each made in a file of ours: each is told, with the place, the reason and the fix."""

from __future__ import annotations

import re

import pytest

from cluster.check.__main__ import check_document
from tests.cluster_files import mistakes_in_clusters, mistakes_in_jobs, mistakes_in_launcher
from tests.cluster_files.manifests import read
from tests.cluster_files.mistakes import Mistake, changed

MISTAKES = {**mistakes_in_clusters.MISTAKES, **mistakes_in_jobs.MISTAKES, **mistakes_in_launcher.MISTAKES}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_it_is_told(mistake: Mistake) -> None:
    problems = [str(problem) for problem in check_document(changed(read(mistake.file), mistake.changes))]
    told = re.compile(f"{re.escape(mistake.place)}: .*{mistake.told}" if mistake.place else f".*{mistake.told}")
    matching = [text for text in problems if told.match(text)]
    assert len(matching) == 1, problems
    assert len(problems) <= 3, problems
    assert "\n" not in matching[0]


def test_there_are_many() -> None:
    assert len(MISTAKES) >= 30
