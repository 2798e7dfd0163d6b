"""Where the layers of a model stand in a captured graph, and what is beside them.

A parameter's layer is the module that owns it. In the graph that is each node that calls the module; or, where its
forward was looked into, the nodes of that; or, where it has other layers inside, the calls that take the parameter.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import networkx as nx
from torch import fx, nn

from . import calls
from .classes import Layer, is_of
from .flows import called, changed, is_question, is_reshape, writes
from .kinds import Kind, graph_kinds
from .layers import is_layer
from .positions import Beside, Both, Either, Last, Not, Position
from .sites import Owner

Region: TypeAlias = frozenset[fx.Node]

_OF_SEVERAL = (nn.RNNBase, nn.MultiheadAttention)
"""Layers whose result is a tuple, of which the graph takes parts."""


@dataclass(frozen=True)
class Unseen:
    """No answer.

    Attributes:
        path: of the module that hides what was asked for.
        why: what is known of it, if it is not called as a whole.
    """

    path: str
    why: str = ""


Answer: TypeAlias = bool | Unseen


def any_of(answers: Collection[Answer]) -> Answer:
    if any(answer is True for answer in answers):
        return True
    return next((one for one in answers if isinstance(one, Unseen)), False)


class View:
    """One graph of a model, asked where layers stand in it."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self._model, self._kinds = model, graph_kinds(graph)
        self._paths: dict[nn.Module, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._paths.setdefault(module, []).append(path)
        self._flow = nx.DiGraph()
        self._made: dict[fx.Node, list[nn.Module]] = {}
        self._taking: dict[nn.Module, list[fx.Node]] = {}
        self._calling: dict[nn.Module, list[fx.Node]] = {}
        self._within: dict[str, list[fx.Node]] = {}
        self._whole = [node for node in graph.nodes if node.target is calls.call_model]
        for node in graph.nodes:
            if not is_question(node) and node.op != "get_attr":
                self._add(node)
        self._later = self._followers(graph)
        self._known: dict[nn.Module, list[Region]] = {}

    def _add(self, node: fx.Node) -> None:
        """Note where a node's value comes from, which modules it calls or takes parameters of, and where it stands."""
        self._flow.add_node(node)
        owners = [owner for used in node.all_input_nodes for owner in self._owners(used)]
        self._flow.add_edges_from((used, node) for used in node.all_input_nodes if used.op != "get_attr")
        if node.all_input_nodes and all(used.op == "get_attr" or used in self._made for used in node.all_input_nodes):
            self._made[node] = owners
        else:
            for owner in owners:
                self._taking.setdefault(owner, []).append(node)
        for module in self._model.get_submodule(str(node.target)).modules() if node.op == "call_module" else ():
            self._calling.setdefault(module, []).append(node)
        for path in _stack(node):
            self._within.setdefault(path, []).append(node)
        if writes(self._model, node):
            values = changed(self._model, node)
            self._flow.add_edges_from((node, user) for value in values for user in value.users if user > node)

    def _owners(self, node: fx.Node) -> list[nn.Module]:
        """The modules whose parameters a node reads, or makes a value of that depends on nothing else."""
        if node.op != "get_attr":
            return self._made.get(node, [])
        path, _, key = str(node.target).rpartition(".")
        try:
            owner = self._model.get_submodule(path)
        except AttributeError:  # fxreg's own
            return []
        return [owner] if key in owner._parameters else []

    def _followers(self, graph: fx.Graph) -> dict[fx.Node, set[nn.Module]]:
        """For every node that reaches an output, two of the modules whose parameters are used behind it, or fewer."""
        owners: dict[fx.Node, set[nn.Module]] = {}
        for module, nodes in (*self._taking.items(), *self._calling.items()):
            for node in nodes if module._parameters else ():
                owners.setdefault(node, set()).add(module)
        found: dict[fx.Node, set[nn.Module]] = {}
        for node in reversed(graph.nodes):
            if node.op == "output":
                found[node] = set()
            elif node in self._flow and (users := [user for user in self._flow.successors(node) if user in found]):
                behind = (found[user] | owners.get(user, set()) for user in users)
                found[node] = {*itertools.islice(set[nn.Module]().union(*behind), 2)}
        return found

    def stands(self, owners: Sequence[Owner], position: Position) -> Answer:
        """Whether a parameter's layer stands at a position, in any of its calls; several own it if it is tied."""
        match position:
            case Not():
                answer = self.stands(owners, position.one)
                return answer if isinstance(answer, Unseen) else not answer
            case Either():
                return any_of([self.stands(owners, position.one), self.stands(owners, position.other)])
            case Both():
                return self.stands(owners, Not(Either(Not(position.one), Not(position.other))))
        layers = dict.fromkeys(owner.layer for owner in owners)
        return any_of([self._is_at(layer, region, position) for layer in layers for region in self._regions(layer)])

    def _is_at(self, layer: nn.Module, region: Region, position: Position) -> Answer:
        """Whether a call of a layer is at a position; the region may also be a call that hides it."""
        hiding = next((path for node in region if (path := self._hides(node, layer)) is not None), None)
        if isinstance(position, Last):
            is_last = self._is_last(layer, region)
            return is_last if hiding is None or not is_last else Unseen(hiding)  # the last one inside, or not?
        if hiding is not None:
            return Unseen(hiding)
        assert isinstance(position, Beside)
        beside = self._following(region) if position.side == "before" else self._preceding(region)
        around = {path for node in region for path in _stack(node)}
        return any_of([self._is_in(node, around, position.types) for node in beside])

    def _hides(self, node: fx.Node, layer: nn.Module) -> str | None:
        """The path of what a node of one of the layer's regions calls as a whole, if the layer is but inside."""
        if node in self._whole:
            return ""
        is_inside = node.op == "call_module" and self._model.get_submodule(str(node.target)) is not layer
        return str(node.target) if is_inside and node in self._calling.get(layer, ()) else None

    def _regions(self, layer: nn.Module) -> list[Region]:
        """The nodes of every call of a layer, and of every call that hides it."""
        if layer not in self._known:
            whole = self._calling.get(layer, []) + self._whole
            is_leaf = not any(inner._parameters for name, inner in layer.named_modules() if _is_other_layer(name))
            inside = {node for path in self._paths[layer] for node in self._within.get(path, ())} if is_leaf else set()
            taking = {*self._taking.get(layer, ())} - inside
            calls = [frozenset({node}) for node in (*whole, *taking)]
            parts = nx.weakly_connected_components(self._flow.subgraph(inside.difference(whole)))
            self._known[layer] = [*calls, *map(frozenset, parts)]
        return self._known[layer]

    def _following(self, region: Region) -> Iterator[fx.Node]:
        """What takes what a layer gives."""
        waiting = [*region]
        while waiting:
            value = waiting.pop()
            for user in value.users:
                if user in region or is_question(user):
                    continue
                yield user
                if self._passes(user, value):
                    waiting.append(user)
                if writes(self._model, user):
                    break  # whoever comes later gets something else

    def _preceding(self, region: Region) -> Iterator[fx.Node]:
        """What gives what a layer takes."""
        waiting = [*region]
        while waiting:
            node = waiting.pop()
            for value in self._flow.predecessors(node):
                is_written = any(writes(self._model, user) and user < node for user in value.users)
                if value in region or is_written:  # whoever wrote into it is a predecessor as well
                    continue
                if node in region or self._passes(node, value) or writes(self._model, value):
                    yield value
                    waiting += [value] if any(self._passes(value, used) for used in value.all_input_nodes) else []

    def _passes(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether a node gives the numbers of a value, or one of the results of a layer."""
        if called(node) == "getitem" and value.op == "call_module":
            return isinstance(self._model.get_submodule(str(value.target)), _OF_SEVERAL)
        return is_reshape(self._model, node, value)

    def _is_in(self, node: fx.Node, around: Collection[str], types: tuple[Layer, ...]) -> Answer:
        """Whether a node stands in a layer of such a type, which does not stand around."""
        answers = [is_of(types, self._kinds[path]) for path in _stack(node) if path not in around]
        if True in answers:
            return True
        if None in answers:
            return Unseen(_stack(node)[-1], "its class is not loaded")
        if node.op != "call_module":
            return False
        module = self._model.get_submodule(str(node.target))
        inside = () if is_layer(module) else (inner for inner in module.modules() if inner is not module)
        return Unseen(str(node.target)) if any(is_of(types, Kind((type(inner),))) for inner in inside) else False

    def _is_last(self, layer: nn.Module, region: Region) -> bool:
        later = [self._later[node] for node in region if node in self._later]
        return bool(later) and not set[nn.Module]().union(*later) - {layer}


def _is_other_layer(name: str) -> bool:
    return bool(name) and not name.startswith("parametrizations.")


def _stack(node: fx.Node) -> list[str]:
    """The paths of the modules around a node, its own last."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
