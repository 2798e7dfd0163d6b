"""locate: (model, captured graph, edit) → the calls in the graph whose activations it acts on."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from . import calls
from .layers import is_layer
from .planning import PenalizeActivation
from .shapes import torch_name
from .torch_calls import is_call_of, may_write, nodes_in, sharing_memory, written

_SEVERAL_LAYERS = (nn.MultiheadAttention, nn.RNNBase, nn.AdaptiveLogSoftmaxWithLoss, nn.RNNCellBase)
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


def spots(model: nn.Module, graph: fx.Graph, edit: PenalizeActivation) -> Iterator[Spot]:
    """Every call that the graph shows, in order."""
    for node in graph.nodes:
        if edit.op is None:
            if node.target is calls.passes and node.args[1] == edit.sites[0] and node.args[2] == edit.on:
                yield _spot(model, node, node.args[0])
        elif is_call_of(edit.op, node.op, node.target) and _stands_in(node) in edit.sites:
            if edit.on == "output":
                yield _spot(model, node.next, (node,))
            else:
                taken = dict.fromkeys(nodes_in((node.args, node.kwargs)))
                yield _spot(model, node, tuple(one for one in taken if one.op != "get_attr"))


def regions(model: nn.Module, graph: fx.Graph, edit: PenalizeActivation) -> Iterator[tuple[fx.Node, str]]:
    """Every call of a module as a whole in which the edit may find activations, and where in that module."""
    for node in graph.nodes:
        if node.op != "call_module" and node.target is not calls.call_model:
            continue
        region = model if node.op != "call_module" else model.get_submodule(str(node.target))
        for path in edit.sites:
            site = model.get_submodule(path)
            if edit.op is None and site is region and node.op == "call_module":
                continue  # what passes there is marked
            inner = next((name for name, module in region.named_modules() if module is site), None)
            if inner is not None:
                yield node, inner


def is_written_later(model: nn.Module, spot: Spot, value: fx.Node) -> bool:
    """Whether something behind a spot may write into the memory of a value."""
    memory = sharing_memory([value])
    node = spot.before
    while node.op != "root":
        if _may_write(model, node) and not memory.isdisjoint(written(node)):
            return True
        node = node.next
    return False


def _may_write(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return bool(getattr(module, "inplace", False)) or not is_layer(module) or bool(module._modules)
    return node.op in ("call_function", "call_method") and not _is_ours(node) and may_write(node)


def _is_ours(node: fx.Node) -> bool:
    return getattr(node.target, "__module__", None) == calls.__name__


def _spot(model: nn.Module, before: fx.Node, values: tuple[fx.Node, ...]) -> Spot:
    return Spot(before, values, len(values) == 1 and _is_tensor(model, values[0]))


def _is_tensor(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        several = isinstance(module, _SEVERAL_LAYERS) or bool(getattr(module, "return_indices", False))
        return is_layer(module) and not several
    if node.op not in ("call_function", "call_method") or torch_name(node) in _SEVERAL:
        return False
    return node.target is calls.expect_tensor or not _is_ours(node)


def _stands_in(node: fx.Node) -> str:
    """The path of the module in whose forward a call stands."""
    return next(reversed([path for path, _ in node.meta.get("nn_module_stack", {}).values()]), "")
