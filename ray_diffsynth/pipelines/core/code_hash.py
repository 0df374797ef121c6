"""The identity of a class's code, for the keys of the cache: what it does, not how it is written down."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap


def code_hash(cls: type, base: type) -> str:
    """Hash of the source of `cls` and of its bases below `base`, which names what is inherited from there on.

    Comments, docstrings and layout do not count. Functions outside the classes are not seen, nor is a class that was
    made at run time or in a REPL: its name stands for it.
    """
    digest = hashlib.blake2b(digest_size=8)
    for each in cls.__mro__:
        if not issubclass(base, each):
            digest.update(_code(each).encode())
    return digest.hexdigest()


def _code(cls: type) -> str:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return cls.__qualname__
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # A text that stands alone does nothing: the docstring of a class, function or attribute.
            setattr(node, "body", [line for line in body if not _is_text(line)] or [ast.Pass()])  # noqa: B010
    return ast.unparse(tree)


def _is_text(line: ast.AST) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)
