"""When a RayCronJob starts: five fields as cron has them, and a time zone beside them."""

from __future__ import annotations

import zoneinfo
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.check.problem import Place, Problem

_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
FIELDS_OF_CRON: Mapping[str, tuple[int, int, Sequence[str]]] = {
    "minute": (0, 59, ()),
    "hour": (0, 23, ()),
    "day of the month": (1, 31, ()),
    "month": (1, 12, _MONTHS),
    "day of the week": (0, 6, _DAYS),
}
"""Field -> its least and greatest number, and words in their place."""


def schedule_problems(spec: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong in `schedule` and `timeZone` of a RayCronJob's `spec`."""
    schedule = str(spec.get("schedule", ""))
    place: Place = ("spec", "schedule")
    words = schedule.split()
    if "TZ=" in schedule:
        yield Problem(place, f"{words[0]} is refused here; use timeZone")
    elif not schedule.startswith("@"):
        if len(words) != len(FIELDS_OF_CRON):
            message = f"has {len(words)} fields; write {len(FIELDS_OF_CRON)}: {', '.join(FIELDS_OF_CRON)}"
            yield Problem(place, message)
        for word, (name, (least, most, names)) in zip(words, FIELDS_OF_CRON.items(), strict=False):
            if not all(_is_time(part, least, most, names) for part in word.split(",")):
                known = f"{least} to {most}" + (f", or {' '.join(names)}" if names else "")
                yield Problem(place, f"{word} is no {name}; write *, numbers of {known}, as 1,5 or 1-5 or */2")
    if (zone := spec.get("timeZone")) is not None and zone not in zoneinfo.available_timezones():
        yield Problem(("spec", "timeZone"), f"{zone} is no time zone; write e.g. Etc/UTC or Europe/Berlin")


def _is_time(part: str, least: int, most: int, names: Sequence[str]) -> bool:
    """Whether a field of a schedule may hold `part`: a star, a number or a range, with a step or without."""
    span, _, step = part.partition("/")
    if step and not (step.isdigit() and int(step)):
        return False
    numbers = []
    for word in [] if span in ("*", "?") else span.split("-"):
        if word.upper() in names:
            numbers.append(least + names.index(word.upper()))
        elif word.isdigit():
            numbers.append(int(word))
        else:
            return False
    return len(numbers) <= 2 and numbers == sorted(numbers) and all(least <= number <= most for number in numbers)
