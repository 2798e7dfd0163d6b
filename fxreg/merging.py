"""merge: the graphs of one forward in training and in evaluation → one graph that asks for the mode.

Numbers that differ (`dropout if self.training else 0.0`) become a choice by the mode. Where the two do different
things, no graph holds both: the modules that do them are named, and must stay whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from . import calls
from .structure import alike


class _OtherShape(Exception):  # noqa: N818  not an error
    """Two arguments are not built alike."""


def differing(one: fx.Graph, other: fx.Graph, numbers: bool) -> set[str]:
    """The paths of the modules whose forwards two graphs of the same model hold differently.

    Args:
        numbers: whether other numbers, and not only other operations, are a difference.
    """
    mine, theirs = _operations(one), _operations(other)
    found = {path for path in mine.keys() | theirs.keys() if mine.get(path) != theirs.get(path)}
    if found:
        return found
    partner = dict(zip(other.nodes, one.nodes, strict=True))

    def compare(value: Any, another: Any) -> Any:
        if isinstance(value, fx.Node) or isinstance(another, fx.Node):
            if partner.get(another) is not value:
                raise _OtherShape
        elif numbers and not alike(value, another):
            raise _OtherShape

    for node, twin in zip(one.nodes, other.nodes, strict=True):
        try:
            if node.op == twin.op == "placeholder" or node.target == twin.target:
                _zipped(compare, _arguments(node), _arguments(twin))
                continue
        except _OtherShape:
            pass
        found.add(path_of(node))
    return found


def merged(training: fx.Graph, evaluation: fx.Graph, child: str) -> fx.Graph:
    """One graph for both modes, of two between which only numbers differ.

    Args:
        child: the path of the module whose `training` tells the mode.
    """
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    modes: list[fx.Node] = []

    def choose(value: Any, other: Any) -> Any:
        if isinstance(value, fx.Node):
            return new[value]
        if isinstance(value, _Likeness):
            value, other = value.kind, other.kind
        if alike(value, other):
            return value
        if not modes:
            modes.append(graph.call_function(getattr, (graph.get_attr(child), "training")))
        if value is True and other is False:
            return modes[0]
        choice = graph.call_function(calls.by_mode, (modes[0], value, other))
        choice.meta.update(is_wrapped=True, nn_module_stack=stack)
        return choice

    for node, twin in zip(training.nodes, evaluation.nodes, strict=True):
        stack = node.meta.get("nn_module_stack", {})
        args, kwargs = _zipped(choose, _arguments(node), _arguments(twin))
        new[node] = graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        new[node].meta.update(node.meta)
    return graph


def path_of(node: fx.Node) -> str:
    """The path of the innermost module in whose forward a node was recorded."""
    paths = [*node.meta.get("nn_module_stack", {})]
    if node.op == "call_module" and len(paths) > 1:
        return str(paths[-2])
    return str(paths[-1]) if paths else ""


def _operations(graph: fx.Graph) -> dict[str, list[Any]]:
    """What is done in each module's own forward, in order."""
    found: dict[str, list[Any]] = {}
    for node in graph.nodes:
        found.setdefault(path_of(node), []).append((node.op, node.target))
    return found


@dataclass(frozen=True)
class _Likeness:
    """What an opaque module returned: other in the two modes, if that is how it is, but one thing."""

    kind: Any


def _arguments(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if node.target is calls.expect_like:
        value, kind, what = node.args
        return (value, _Likeness(kind), what), {}
    return node.args, node.kwargs


def _zipped(combine: Callable[[Any, Any], Any], one: Any, other: Any) -> Any:
    """Two arguments of the same shape as one, leaf by leaf."""
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        if len(one) != len(other):
            raise _OtherShape
        return type(one)(_zipped(combine, a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            raise _OtherShape
        return {key: _zipped(combine, value, other[key]) for key, value in one.items()}
    if isinstance(one, slice) and isinstance(other, slice):
        parts = ((one.start, other.start), (one.stop, other.stop), (one.step, other.step))
        return slice(*(_zipped(combine, a, b) for a, b in parts))
    if isinstance(one, tuple | list | dict | slice) or isinstance(other, tuple | list | dict | slice):
        raise _OtherShape
    return combine(one, other)
