"""A text for what a formula means, so that two formulas share it only if they cannot be told apart."""

import ast
import hashlib
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .enclosed import defaults, enclosed


def fingerprint(description: str, functions: tuple[Callable[..., Any], ...]) -> str:
    """A short hash of a description and of the functions' meaning; an identifier."""
    meaning = "\n".join([description, *map(_source, functions)])
    return "x" + hashlib.sha256(meaning.encode()).hexdigest()[:8]


def _source(function: Callable[..., Any]) -> str:
    """What decides a formula's meaning, as text: its syntax tree without docstring, its defaults and closure."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        if isinstance(tree, ast.FunctionDef):
            tree.decorator_list = []
            if isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Constant):
                tree.body = tree.body[1:]
        text = ast.dump(tree)
    except (OSError, TypeError, SyntaxError):  # typed at a prompt, or made by exec
        code = function.__code__
        text = repr((code.co_code, code.co_consts, code.co_names))
    return "\n".join([text, *map(_identity, (*enclosed(function), *defaults(function)))])


def _identity(value: object) -> str:
    """A text that two values share only if a formula cannot tell them apart."""
    if isinstance(value, Tensor) and value.device.type != "meta":
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"tensor {value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
    if isinstance(value, types.FunctionType):
        return _source(value)
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({','.join(map(_identity, value))})"
    if isinstance(value, bool | int | float | complex | str | bytes | types.NoneType | types.ModuleType | type):
        return repr(value)
    return f"{type(value).__qualname__} at {id(value)}"  # alive as long as the formula is, so no other has this id
