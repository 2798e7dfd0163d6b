"""locate: (model, captured graph, edit) → the calls in the graph whose activations it acts on."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from . import calls
from .layers import is_plain_layer
from .planning import PenalizeActivation
from .shapes import torch_name
from .torch_calls import is_call_of, may_write, nodes_in, sharing_memory, written

_SEVERAL_LAYERS = (nn.MultiheadAttention, nn.RNNBase, nn.AdaptiveLogSoftmaxWithLoss, nn.RNNCellBase, nn.Identity)
_SEVERAL = {
    "chunk", "split", "unbind", "tensor_split", "hsplit", "vsplit", "dsplit", "topk", "sort", "max", "min", "median",
    "mode", "kthvalue", "cummax", "cummin", "frexp", "aminmax", "var_mean", "std_mean", "unique", "svd", "qr", "eigh",
    "eig", "slogdet", "lu", "meshgrid", "broadcast_tensors", "where", "nonzero", "multi_head_attention_forward",
    "getitem", "unpack", "getattr",
}  # fmt: skip
"""Functions whose result may be more than one tensor."""


@dataclass(frozen=True)
class Spot:
    """Where activations pass.

    Attributes:
        before: the node in front of which they are all there, and as they were then.
        values: what they are.
        is_tensor: whether it is certain that this is one tensor.
    """

    before: fx.Node
    values: tuple[fx.Node, ...]
    is_tensor: bool


class Places:
    """What a graph calls, looked up by what is called."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self._model, self._graph = model, graph
        self._marks: dict[tuple[Any, Any], list[fx.Node]] = {}
        self._regions: dict[nn.Module, list[tuple[fx.Node, str]]] = {}
        self._whole: dict[nn.Module, list[fx.Node]] = {}
        self._writers: list[fx.Node] = []
        for node in graph.nodes:
            if node.target is calls.passes:
                self._marks.setdefault((node.args[1], node.args[2]), []).append(node)
            elif node.op == "call_module" or node.target is calls.call_model:
                for inner, module in self._inside(node):
                    self._regions.setdefault(module, []).append((node, inner))
                if node.op == "call_module":
                    self._whole.setdefault(model.get_submodule(str(node.target)), []).append(node)
            if _may_write(model, node):
                self._writers.append(node)
        self._written = functools.cache(written)
        self._returned = sharing_memory(graph.output_node().all_input_nodes)

    def _inside(self, node: fx.Node) -> Iterator[tuple[str, nn.Module]]:
        """The modules that a node calls as a whole; what passes a module that it calls itself is marked."""
        if node.op != "call_module":
            yield from self._model.named_modules()
        elif (module := self._model.get_submodule(str(node.target)))._modules:
            yield from ((inner, one) for inner, one in module.named_modules() if one is not module)

    def spots(self, edit: PenalizeActivation) -> Iterator[Spot]:
        """Every call that the graph shows, in order."""
        if edit.op is None:
            for node in self._marks.get((edit.sites[0], edit.on), ()):
                yield self._spot(node, node.args[0])
            return
        sites = {*edit.sites}
        for node in [*self._graph.nodes]:
            if is_call_of(edit.op, node.op, node.target) and _stands_in(node) in sites:
                if edit.on == "output":
                    yield self._spot(node.next, (node,))
                else:
                    taken = nodes_in((node.args, node.kwargs))
                    yield self._spot(node, tuple(one for one in taken if one.op != "get_attr"))

    def regions(self, edit: PenalizeActivation) -> Iterator[tuple[fx.Node, str]]:
        """Every call of a module as a whole in which the edit may find activations, and where in that module."""
        for path in edit.sites:
            site = self._model.get_submodule(path)
            yield from self._regions.get(site, ())
            if edit.op is not None:
                yield from ((node, "") for node in self._whole.get(site, ()))

    def is_written_later(self, spot: Spot, value: fx.Node) -> bool:
        """Whether something behind a spot may write into the memory of a value: whoever is given it, too."""
        memory = sharing_memory([value])
        later = [node for node in self._writers if node >= spot.before]
        return not memory.isdisjoint(self._returned) or any(not memory.isdisjoint(self._written(one)) for one in later)

    def _spot(self, before: fx.Node, values: Any) -> Spot:
        return Spot(before, values, len(values) == 1 and _is_tensor(self._model, values[0]))


def says_it_writes(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node is a call that writes into what it is given, as its name or an `inplace` says."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    return node.op in ("call_function", "call_method") and not _is_ours(node) and may_write(node)


def _may_write(model: nn.Module, node: fx.Node) -> bool:
    if says_it_writes(model, node):
        return True
    return node.op == "call_module" and not is_plain_layer(model.get_submodule(str(node.target)))


def _is_ours(node: fx.Node) -> bool:
    return getattr(node.target, "__module__", None) == calls.__name__


def _is_tensor(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        several = isinstance(module, _SEVERAL_LAYERS) or bool(getattr(module, "return_indices", False))
        return is_plain_layer(module) and not several
    if node.op not in ("call_function", "call_method") or torch_name(node) in {*_SEVERAL, ""}:
        return False
    return node.target is calls.expect_tensor or not _is_ours(node)


def _stands_in(node: fx.Node) -> str:
    """The path of the module in whose forward a call stands."""
    return next(reversed([path for path, _ in node.meta.get("nn_module_stack", {}).values()]), "")
