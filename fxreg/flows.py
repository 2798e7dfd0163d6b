"""What flows where in a captured graph: what calls are, which uses a value has, and what reaches the output."""

import inspect
from collections.abc import Iterator
from typing import Any

import networkx as nx
import torch
from torch import fx, nn

from . import calls
from .layers import is_layer, is_plain_layer
from .module import CHILD
from .side_channels import has_hooks
from .torch_calls import KINDS, RANKS, SIZES, may_write

_MODEL = f"{CHILD}.model."
_RESHAPES = {
    "view", "reshape", "flatten", "unflatten", "ravel", "permute", "transpose", "swapaxes", "swapdims", "movedim",
    "moveaxis", "t", "squeeze", "unsqueeze", "contiguous", "clone", "view_as", "reshape_as", "_unsafe_view", "T", "mT",
}  # fmt: skip
_RESHAPING_LAYERS = (nn.Identity, nn.Flatten, nn.Unflatten)
_PASSING = (calls.expect_tensor, calls.expect_like)
_CHECKS = (calls.passes, calls.expect_same, calls.expect_assumed, calls.expect_default, calls.expect_given)
_DATA = (calls.by_mode, calls.make, calls.unpack, calls.take_inputs, calls.give_output)
_QUESTIONS = SIZES | RANKS | KINDS
_AUGMENTED = {f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or")}
_TORCH = ("torch", "_operator", "operator", "math", "builtins")


def read_value(model: nn.Module, target: str) -> Any:
    """What a node that reads an attribute gives, if it belongs to the model; None for what is fxreg's own."""
    found: Any = model
    path = target.removeprefix(_MODEL)
    if path.partition(".")[0] == CHILD:
        return None
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def called(node: fx.Node) -> str:
    """The name of the torch function, method, operator or property that a node calls; "" for anything else."""
    target: Any = node.target
    if node.op == "call_method":
        return str(target)
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._opname) if target.namespace == "aten" else ""
    if target is getattr:
        return str(node.args[1])
    is_known = (getattr(target, "__module__", None) or "").partition(".")[0] in _TORCH
    return str(getattr(target, "__name__", "")) if is_known else ""


def arguments(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a call by name, defaults included; None where the function does not tell its names."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        schema = target._schema.arguments
        given = {one.name: one.default_value for one in schema}
        return given | dict(zip(given, node.args, strict=False)) | node.kwargs
    try:
        bound = inspect.signature(target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    return bound.arguments


def uses(model: nn.Module, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Every use of a node's value, also of the same numbers in another shape, as (value, user).

    To ask for a size or a data type is no use.
    """
    waiting = [node]
    while waiting:
        value = waiting.pop()
        for user in value.users:
            if _reshapes(model, user, value):
                waiting.append(user)
            elif user.target not in _CHECKS and called(user) not in _QUESTIONS:
                yield value, user


def reached(model: nn.Module, graph: fx.Graph) -> set[int]:
    """The ids of the parameters on which an output, or anything that the graph does not show, may depend by a gradient.

    What is called as a whole counts with all that it has and is given.
    """
    flow = nx.DiGraph()
    end = object()
    for node in graph.nodes:
        if called(node) not in ("detach", "training", *_QUESTIONS):
            flow.add_edges_from((used, node) for used in node.all_input_nodes)
        if node.op == "output" or not _is_pure(model, node):
            flow.add_edge(node, end)
    found = set[int]()
    for node in nx.ancestors(flow, end):
        if node.target is calls.call_model:
            return {*map(id, model.parameters())}
        if node.op == "call_module":
            found.update(map(id, model.get_submodule(node.target).parameters()))
        elif node.op == "get_attr":
            value = read_value(model, node.target)
            found.update(map(id, value.parameters() if isinstance(value, nn.Module) else (value,)))
    return found


def _reshapes(model: nn.Module, node: fx.Node, value: fx.Node) -> bool:
    """Whether a node gives the numbers of a value, all of them and nothing else, in any shape or order."""
    if not node.args or node.args[0] is not value:
        return False
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return type(module) in _RESHAPING_LAYERS and is_plain_layer(module)
    is_view_of_bits = any(isinstance(one, torch.dtype) for one in (*node.args, *node.kwargs.values()))
    return node.target in _PASSING or (called(node) in _RESHAPES and not is_view_of_bits)


def _is_pure(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node does nothing but give a value."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        hooked = any(map(has_hooks, module.modules()))
        return is_layer(module) and not hooked and not getattr(module, "inplace", False)
    if node.op not in ("call_function", "call_method") or node.target in (*_PASSING, *_CHECKS, *_DATA):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(called(node)) and not node.target._schema.is_mutable
    return bool(called(node)) and called(node) not in _AUGMENTED and not may_write(node)
