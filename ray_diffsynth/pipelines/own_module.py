"""A module of the user's own, that an option names: on Python's path or in the working folder. No torch."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from ray_diffsynth.errors import UserError, nearest


class FamilyError(UserError, ValueError):
    """No such family, or a model folder whose family cannot be told."""


def import_own_module(family: str, known: Iterable[str]) -> ModuleType:
    """The module of `family`, `my_module[:Class]` or `my_package.my_module[:Class]`; `known`: the names of no module.

    Raises FamilyError for what is no module's name, is not found (lists the nearest of `known`, and all), or cannot be
    imported (says where).
    """
    name = family.partition(":")[0]
    if not all(part.isidentifier() for part in name.split(".")) or name.endswith(".py"):
        stem = Path(name).stem
        own = stem != name and stem.isidentifier()
        fix = f"name the module and not its file, --family {stem}; " if own else ""
        raise FamilyError(f"unknown family {family!r}: {fix}{_known(name, known)}")
    try:
        return import_from_working_folder(name)
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        if f"{name}.".startswith(f"{missing}."):
            raise FamilyError(f"unknown family {family!r}: {_known(name, known)} ({error})") from error
        raise FamilyError(
            f"the family {family!r} needs the module {missing}, which is not there; install it on every machine, or "
            "put it into the working folder"
        ) from error
    except Exception as error:  # it runs the user's own code
        raise FamilyError(
            f"the family {family!r} cannot be imported: {describe_failure(error)}; mend it there"
        ) from error


def import_from_working_folder(name: str) -> ModuleType:
    """The module `name`; raises whatever it raises.

    The working folder comes last on the path, so that nothing in it hides a library.
    """
    _search_working_folder()
    return importlib.import_module(name)


def describe_failure(error: Exception) -> str:
    """What the import of a user's module raised, and where."""
    return f"{type(error).__name__}: {error}{_place(error)}"


def _search_working_folder() -> None:
    """A script's own folder is on the path of modules, the folder in which it was started is not."""
    try:
        folder = str(Path.cwd())
    except FileNotFoundError:  # it has been removed
        return
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()


def _known(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = nearest(name, names)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return (
        f"{hint}known: {', '.join(names)}; a pipeline of your own is named by its module, my_module[:Class] or "
        "my_package.my_module[:Class], which lies in the working folder or on PYTHONPATH"
    )


def _place(error: Exception) -> str:
    """The file and line of the user's code that failed; a SyntaxError names its own."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    inside = [frame for frame in frames[2:] if frame.filename != importlib.__file__]
    return "" if isinstance(error, SyntaxError) or not inside else f" ({inside[-1].filename}, line {inside[-1].lineno})"
