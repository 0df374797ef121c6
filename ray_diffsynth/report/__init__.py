"""What a job leaves for people: ``report.json`` and, from the same data, ``report.html``."""

from ray_diffsynth.report.document import LIBRARIES, library_versions, make_report, write_json
from ray_diffsynth.report.image import PageImage, thumbnail
from ray_diffsynth.report.page import render, write_page
from ray_diffsynth.report.training import training_numbers

__all__ = [
    "LIBRARIES",
    "PageImage",
    "library_versions",
    "make_report",
    "render",
    "thumbnail",
    "training_numbers",
    "write_json",
    "write_page",
]
