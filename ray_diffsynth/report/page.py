"""``report.html``: one file that needs no network, made from the very data of ``report.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ray_diffsynth.config import JOBS
from ray_diffsynth.printable import printable
from ray_diffsynth.report.charts import bar_chart
from ray_diffsynth.report.document import plain, write_text
from ray_diffsynth.report.image import PageImage
from ray_diffsynth.report.load import load_lines
from ray_diffsynth.report.training import training_charts

PAGE = "report.html"
CONFIGS = {config.job: config for config in JOBS}


def write_page(
    output_path: str,
    report: Mapping[str, Any],
    *,
    metrics: Sequence[Mapping[str, Any]] = (),
    images: Sequence[PageImage] = (),
) -> str:
    """Write ``<output_path>/report.html`` and return its path. `report` is what `make_report` made of a job's config.

    `metrics` are the lines of metrics.jsonl. `images` are the contact sheet of stage 1, the sample grids of stage 2,
    the images of generate. Raises OSError when it cannot be written.
    """
    return write_text(output_path, PAGE, render(report, metrics=metrics, images=images, output_path=output_path))


def render(
    report: Mapping[str, Any],
    *,
    metrics: Sequence[Mapping[str, Any]] = (),
    images: Sequence[PageImage] = (),
    output_path: str = "",
) -> str:
    """The page as text, by the template of the report's job."""
    content: dict[str, Any] = plain(report)
    job = content["job"]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalized,
    )
    environment.filters.update(number=number, size=size, duration=duration)
    charts = {"train": lambda: training_charts(metrics), "preprocess": lambda: preprocess_charts(content)}
    return environment.get_template(f"{job}.html.j2").render(
        report=content,
        at=lambda key: lookup(content, key),
        charts=charts[job]() if job in charts else [],
        images=images,
        grouped=[(heading, list(shown)) for heading, shown in groupby(images, key=lambda image: image.group)],
        output_path=output_path,
        options=options(content["config"], CONFIGS[job]),
        load=load_lines(content, output_path),
    )


def _finalized(value: Any) -> Any:
    """Whatever text comes into the page: without control characters, which HTML does not take. Charts are whole."""
    return printable(value, keep="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value


def lookup(report: Mapping[str, Any], key: str) -> Any:
    """``counts.samples`` of the report; None where there is no such thing."""
    value: Any = report
    for part in key.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            return None
    return value


def options(config: Mapping[str, Any], config_class: type[Any]) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """The options of a run: those that were given, and those that are as they come."""
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    given = [(name, value) for name, value in config.items() if value != defaults.get(name, dataclasses.MISSING)]
    return given, [(name, value) for name, value in config.items() if (name, value) not in given]


def preprocess_charts(report: Mapping[str, Any]) -> list[Markup]:
    """Samples per bucket and, where something was encoded, the rate of each pool."""
    rates = {
        group["name"]: group["rows_per_second"] for group in report.get("groups", []) if group.get("rows_per_second")
    }
    charts = [
        bar_chart("Samples per size (height×width)", report.get("buckets", {}), unit="samples"),
        bar_chart("Rows encoded per second, by pool", rates, unit="rows a second"),
    ]
    return [chart for chart in charts if chart]


def number(value: Any) -> str:
    """A number with thin thousands, at most four digits behind the point."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}".replace(",", "\u202f") if isinstance(value, int) else f"{value:.4g}"


def size(value: float | None) -> str:
    """Bytes, in the unit that suits."""
    if value is None:
        return "–"
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} bytes"


def duration(seconds: float | None) -> str:
    """Seconds as h, min and s."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole // 60 % 60} min"
