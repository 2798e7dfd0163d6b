"""What flows where in a captured graph: what calls are, which uses a value has, and what reaches the output."""

import inspect
from collections.abc import Iterable, Iterator
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
_VIEWS = {
    "getitem", "select", "narrow", "slice", "split", "chunk", "tensor_split", "unbind", "expand", "expand_as", "detach",
    "diagonal", "unfold", "as_strided", "real", "imag", "H", "mH", "data",
}  # fmt: skip
_MAKERS = {
    "add", "sub", "mul", "div", "matmul", "mm", "bmm", "addmm", "linear", "relu", "gelu", "silu", "tanh", "sigmoid",
    "softmax", "log_softmax", "mean", "sum", "layer_norm", "clone",
}  # fmt: skip
"""Functions of torch's that always make something new."""
_RESHAPING_LAYERS = (nn.Identity, nn.Flatten, nn.Unflatten)
_PASSING = (calls.expect_tensor, calls.expect_some, calls.expect_like)
_CHECKS = (
    calls.passes, calls.expect_same, calls.expect_assumed, calls.expect_default, calls.expect_given, calls.expect_valid
)  # fmt: skip
_DATA = (calls.by_mode, calls.make, calls.unpack, calls.take_inputs, calls.give_output)
_OURS = (*_PASSING, *_CHECKS, *_DATA)
_QUESTIONS = {"training"} | SIZES | RANKS | KINDS
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
            if is_reshape(model, user, value):
                waiting.append(user)
            elif not is_question(user):
                yield value, user


def is_question(node: fx.Node) -> bool:
    """Whether a node does not use a value's numbers, but asks for its size, data type or mode, or checks it."""
    return node.target in _CHECKS or called(node) in _QUESTIONS


def reached(model: nn.Module, graph: fx.Graph) -> set[int]:
    """The ids of the parameters on which an output, or anything that the graph does not show, may depend by a gradient.

    What is called as a whole counts with all that it has and is given.
    """
    flow = nx.DiGraph()
    end = object()
    for node in graph.nodes:
        if called(node) not in ("detach", *_QUESTIONS):
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


def is_reshape(model: nn.Module, node: fx.Node, value: fx.Node) -> bool:
    """Whether a node gives the numbers of a value, all of them and nothing else, in any shape or order."""
    if not node.args or node.args[0] is not value:
        return False
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return type(module) in _RESHAPING_LAYERS and is_plain_layer(module)
    is_view_of_bits = any(isinstance(one, torch.dtype) for one in (*node.args, *node.kwargs.values()))
    return node.target in _PASSING or (called(node) in _RESHAPES and not is_view_of_bits)


def writes(model: nn.Module, node: fx.Node) -> bool:
    """Whether a layer, function, method or operator that is known writes into what it is given."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if not called(node) or node.target in _OURS:
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    return called(node) in _AUGMENTED or may_write(node)


def changed(model: nn.Module, node: fx.Node) -> set[fx.Node]:
    """The values that a node that writes changes: what it writes into, and all views of the same memory."""
    given, target = {*node.all_input_nodes}, node.target
    if isinstance(target, torch._ops.OpOverload):
        named = arguments(node) or {}
        into = [named[one.name] for one in target._schema.arguments if one.alias_info and one.alias_info.is_write]
    else:
        into = [*node.args[:1], node.kwargs.get("out"), node.kwargs.get("input")]
    found, waiting = set[fx.Node](), [value for value in into if isinstance(value, fx.Node) and value in given]
    while waiting:
        value = waiting.pop()
        if value not in found and value.op != "get_attr":
            found.add(value)
            waiting += [user for user in value.users if user is not node and _is_view(model, user, value)]
            waiting += [used for used in value.all_input_nodes if _is_view(model, value, used)]
    return found


def _is_view(model: nn.Module, node: fx.Node, value: fx.Node) -> bool:
    """Whether a node may give memory of a value's."""
    if not node.args or node.args[0] is not value:
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return any(one.alias_info is not None for one in node.target._schema.returns)
    return called(node) in _VIEWS or is_reshape(model, node, value) or writes(model, node)


def handed_on(model: nn.Module, values: Iterable[fx.Node]) -> list[fx.Node]:
    """The inputs of which values may be a part, or be in the memory: all that lead to them, but through what is known
    to make something new."""
    found, waiting = set[fx.Node](), [*values]
    while waiting:
        value = waiting.pop()
        if value not in found and not _is_new(model, value):
            found.add(value)
            waiting += value.all_input_nodes
    return sorted(value for value in found if value.op == "placeholder")


def _is_new(model: nn.Module, node: fx.Node) -> bool:
    """Whether a call is known to give memory of its own.

    Methods and operators are not: they may be those of tuples, which are joined as they are, or of objects.
    """
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return is_plain_layer(module) and bool(module._parameters)
    if called(node) not in _MAKERS or node.op == "call_method" or writes(model, node):
        return False
    return isinstance(node.target, torch._ops.OpOverload) or node.target.__module__.partition(".")[0] == "torch"


def _is_pure(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node does nothing but give a value."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return is_layer(module) and not any(map(has_hooks, module.modules())) and not writes(model, node)
    if node.op not in ("call_function", "call_method") or node.target in _OURS:
        return True
    return bool(called(node)) and not writes(model, node)
