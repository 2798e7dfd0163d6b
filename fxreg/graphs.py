"""Graphs as plain data, and as functions."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx.node import _get_qualified_name, map_aggregate, map_arg  # private: the names fx itself writes into code

from .errors import FxregError
from .kinds import qualified


@dataclass(frozen=True)
class _Ref:
    """A node's name, where a pickled graph refers to it."""

    name: str


def written(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """A graph as plain data: functions by their qualified names."""

    def refer(value: Any) -> Any:
        named: Any = lambda v: _Ref(v.name) if isinstance(v, fx.Node) else v  # noqa: E731
        return map_aggregate(value, named)

    return [
        (
            node.op,
            node.name,
            _get_qualified_name(node.target) if callable(node.target) else node.target,
            refer(node.args),
            refer(node.kwargs),
            _kept(node.meta),
        )
        for node in graph.nodes
    ]


def _kept(meta: dict[str, Any]) -> dict[str, Any]:
    """What a pickled graph keeps of a node's metadata: plain data, classes by their qualified names."""
    kept: dict[str, Any] = {key: meta[key] for key in ("is_wrapped", "fxreg") if key in meta}
    if "nn_module_stack" in meta:
        kept["nn_module_stack"] = {
            key: (path, qualified(kind)) for key, (path, kind) in meta["nn_module_stack"].items()
        }
    return kept


def read(rows: list[tuple[Any, ...]]) -> fx.Graph:
    graph, nodes = fx.Graph(), {}
    for op, name, target, args, kwargs, meta in rows:
        found = _looked_up(target) if op == "call_function" else target
        args, kwargs = map_aggregate((args, kwargs), lambda v: nodes[v.name] if isinstance(v, _Ref) else v)
        nodes[name] = graph.create_node(op, found, args, kwargs, name=name)
        nodes[name].meta.update(meta)
    return graph


def _looked_up(name: str) -> Any:
    """The function of a qualified name, wherever its module ends and its attributes begin."""
    parts = name.split(".")
    found: Any = None
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        break
    else:
        found, end = sys.modules["builtins"], 0
    try:
        for part in parts[end:]:
            found = getattr(found, part)
    except AttributeError as error:
        raise FxregError(
            f"unpickling an emitted module: {name} is not there ({error}). Import the module that defines the effect "
            "or function, unchanged, before loading."
        ) from None
    return found


class Lent:
    """A graph for the one who writes into it, while everybody else finds it as it was.

    What its nodes were is kept, and they are made again only if somebody asks: to copy a graph takes a seventh of the
    time of making it.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._kept: fx.Graph | None = graph
        self._rows: list[tuple[Any, ...]] = []

    @property
    def graph(self) -> fx.Graph:
        """As it was. For reading."""
        if self._kept is None:
            self._kept = self._made()
        return self._kept

    def lend(self) -> fx.Graph:
        """One to be written into: at first the graph itself."""
        if self._rows or self._kept is None:
            return self._made()
        lent, self._kept = self._kept, None
        self._rows = [(n, n.name, n.op, n.target, n.args, n.kwargs, n.type, dict(n.meta)) for n in lent.nodes]
        return lent

    def _made(self) -> fx.Graph:
        graph, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
        for node, name, op, target, args, kwargs, kind, meta in self._rows:
            args, kwargs = map_arg((args, kwargs), nodes.__getitem__)
            nodes[node] = graph.create_node(op, target, args, kwargs, name, kind)
            nodes[node].meta.update(meta)
        return graph


def as_function(graph: fx.Graph) -> Callable[..., Any]:
    """A graph without state as a function."""
    forward: Callable[..., Any] = fx.GraphModule(nn.Module(), graph).forward
    return forward
