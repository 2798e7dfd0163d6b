"""Torch functions, methods and properties, as a recorder meets them: what each is to a graph."""

import contextlib
import functools
import operator
import sys
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributions import Distribution
from torch.overrides import is_tensor_method_or_property

from .packages import is_library
from .shapes import LAYER, has_fixed_shape, torch_name

GETATTR = getattr
"""What a graph calls: while a forward is recorded, another function is called so."""

SIZES = {"shape", "size", "numel", "nelement", "__len__"}
RANKS = {"dim", "ndim", "ndimension"}
KINDS = {
    "dtype", "is_floating_point", "is_complex", "element_size", "itemsize", "layout", "is_sparse", "is_quantized",
    "is_nested", "is_tensor", "result_type", "is_signed", "is_mkldnn", "is_sparse_csr", "device", "is_cuda", "is_cpu",
    "is_meta", "is_mps", "is_xpu", "get_device",
}  # fmt: skip
"""Questions whose answers follow from the data types and devices of arguments and parameters."""

DECISIONS = {"__bool__", "__contains__", "item", "is_nonzero", "equal", "allclose"}
"""Questions about values that a forward branches on."""

_VALIDATING = {Distribution.__init__.__code__, Distribution._validate_sample.__code__}

SILENT = {"_set_grad_enabled"}
"""What these change is noticed at the next call."""

WANTS = {"requires_grad_", "__set__"}
"""What asks for a gradient: of a value, or of a tensor that the model keeps."""

_REFUSED = {
    "backward", "register_hook", "retain_grad", "detach_", "resize_", "resize_as_", "set_", "seed",
    "share_memory_", "data", "grad", "register_post_accumulate_grad_hook", "__deepcopy__", "manual_seed", "apply_",
    "map_", "storage", "__set__", "t_", "transpose_", "squeeze_", "unsqueeze_", "swapaxes_", "swapdims_", "as_strided_",
}  # fmt: skip
_WRITING = {
    f"__{name}__": getattr(operator, name)
    for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
}
_OPERATORS = _WRITING | {
    f"__{name}__": getattr(operator, name)
    for name in (
        "getitem", "eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod",
        "pow", "matmul", "xor", "neg", "invert", "lshift", "rshift",
    )
} | {"__and__": operator.and_, "__or__": operator.or_}  # fmt: skip
_REVERSED = {
    f"__r{name}__": getattr(operator, name)
    for name in ("sub", "truediv", "floordiv", "mod", "pow", "matmul", "lshift", "rshift")
}
_PURE = {
    "getitem", "all", "any", "eq", "ne", "lt", "le", "gt", "ge", "sum", "min", "max", "amin", "amax", "bool", "to",
    "long", "int", "float", "isnan", "isinf", "logical_not", "logical_and", "logical_or", "invert", "size", "view",
    "reshape", "flatten", "unsqueeze", "squeeze", "expand", "cumsum", "diff", "add", "sub", "mul", "unpack", "ones",
    "zeros", "arange", "full", "ones_like", "zeros_like", "contiguous", "type", "where", "and_", "or_", "not_",
    "masked_fill", "transpose", "permute", "clone", "detach", "new_ones", "new_zeros", "__invert__", "__and__",
    "__or__", "abs", "count_nonzero", "floordiv", "truediv", "mod", "pow", "neg", "clamp", "isin", "item",
    "contains", "trunc", "ceil", "floor", "round", "sqrt",
}  # fmt: skip


def name_of(function: Any) -> str:
    """The name of a function, method or property."""
    name = str(getattr(function, "__name__", ""))
    return str(function.__self__.__name__) if name == "__get__" else name


def is_torchs(function: Any) -> bool:
    """Whether a function is torch's own, and its name means something: anybody's may be heard of
    (`torch.overrides.wrap_torch_function`)."""
    return not isinstance(function, types.FunctionType) or is_library(function.__module__)


def is_refused(function: Any, name: str) -> bool:
    """Whether a call does something to autograd, to storage or to a generator that a graph cannot hold."""
    if name == "__set__" and function.__self__.__name__ == "requires_grad":
        return False
    return name in _REFUSED or (getattr(function, "__module__", None) or "").startswith("torch.autograd")


def is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def as_node(function: Any, name: str, args: Any, kwargs: Any) -> tuple[str, Any, Any, Any]:
    """The operation, target and arguments of the node for a call."""
    if function is bool:
        return "call_function", bool, args, {}
    if getattr(function, "__name__", "") == "__get__":
        return "call_function", GETATTR, (args[0], name), {}
    if name == "__set__":
        return "call_method", "requires_grad_", args, {}
    if is_tensor_method_or_property(function):
        if name in _OPERATORS:
            return "call_function", _OPERATORS[name], args, kwargs
        if name in _REVERSED:
            return "call_function", _REVERSED[name], (args[1], args[0]), kwargs
        return "call_method", name, args, kwargs
    return "call_function", function, args, kwargs


def holds_only_tensors(value: Any) -> bool:
    """Whether a result is a tensor, or tensors in lists and tuples."""
    if isinstance(value, tuple | list):
        return len(value) > 0 and all(one is None or holds_only_tensors(one) for one in value)
    return isinstance(value, Tensor)


def is_certain(node: Any) -> bool:
    """Whether a node asks if what was drawn from [0, 1) is negative: a layer that is dropped with probability 0."""
    if node.target != "lt" or not isinstance(node.args[0], fx.Node) or isinstance(node.args[1], fx.Node):
        return False
    return node.args[0].target is torch.rand and node.args[1] <= 0


def validating() -> Distribution | None:
    """The distribution of torch's that asks, in the running code, whether what it was given is valid: it raises an
    error if not."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__package__") == __package__:
        frame = frame.f_back
    return frame.f_locals["self"] if frame is not None and frame.f_code in _VALIDATING else None


def is_known_at_once(*nodes: fx.Node) -> bool:
    """Whether what nodes give follows from the placeholders alone, and asking for it does nothing else."""
    return all(one.op == "placeholder" or _is_pure(one) for node in nodes for one in cone(node))


def follows_from_sizes(*nodes: fx.Node) -> bool:
    """Whether what nodes give follows from the sizes of the placeholders, whatever is in them."""
    return is_known_at_once(*nodes) and all(has_fixed_shape(one) for node in nodes for one in cone(node))


def nodes_in(arguments: Any) -> list[fx.Node]:
    """Every node among arguments."""
    found: list[fx.Node] = []
    fx.node.map_arg(arguments, found.append)
    return found


_FRESH = {
    "linear", "embedding", "matmul", "layer_norm", "softmax", "cat", "stack", "add", "sub", "mul", "div", "truediv",
    "pow", "neg", "eq", "ne", "lt", "le", "gt", "ge", "sum", "mean", "ones_like", "zeros_like", "new_zeros", "new_ones",
    "arange", "full", "zeros", "ones", "all", "any", "gelu", "silu", "tanh", "sigmoid", "rsqrt", "exp", "cumsum",
    "scaled_dot_product_attention", "cross_entropy", "masked_fill", "conv1d", "conv2d", "where", "clone", "bmm", "cos",
    "sin", "logical_not", "invert", "size", "dim", "isin", "rms_norm", "group_norm", "outer",
}  # fmt: skip
"""What gives new memory, always."""

_FRESH_LAYERS = (
    nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.Conv1d,
    nn.Conv2d, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softmax,
)  # fmt: skip
"""Not so nn.Identity, nn.Flatten, or nn.Dropout in evaluation: they give what they got."""


def may_write(node: fx.Node) -> bool:
    """Whether a call of a function or method may write into its arguments."""
    name = torch_name(node)
    if (is_in_place(name) and name not in WANTS) or node.target in _WRITING.values():
        return True
    return "out" in node.kwargs or bool(node.kwargs.get("inplace")) or (node.op == "call_function" and not name)


def written(node: fx.Node) -> set[fx.Node]:
    """The nodes whose values a node that writes into its arguments may change: these, and what they may be views of."""
    first, out = node.args[:1], node.kwargs.get("out")
    known = node.op != "call_module" and bool(torch_name(node)) and bool(node.args)
    return sharing_memory(nodes_in((first, out)) if known else node.all_input_nodes)


def sharing_memory(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes, and those that their values may be views of."""
    found, waiting = set[fx.Node](), [*nodes]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            if one.op == "get_attr":  # one tensor, however often it is read
                found.update(one.graph.find_nodes(op="get_attr", target=one.target, sort=False))
            if may_write(one) or (torch_name(one) not in _FRESH and one.meta.get(LAYER) not in _FRESH_LAYERS):
                waiting += one.all_input_nodes
    return found


_SPELLED = {"truediv": "div", "__rdiv__": "div", "mod": "remainder"}
"""Operators that torch, when it runs, calls by another name than Python."""


def is_call_of(op: Any, kind: str, target: Any) -> bool:
    """Whether a node of that kind and target calls a function or method, or one of that name: `"gelu"`, or the dotted
    name by which Python finds it, whatever it calls itself."""
    if kind not in ("call_function", "call_method"):
        return False
    full = call_name(kind, target)
    name = full.rpartition(".")[2]
    if isinstance(op, str):
        if _SPELLED.get(name, name) == _SPELLED.get(op, op) or ("." in op and f".{full}".endswith(f".{op}")):
            return True
        op = _named(op)
        if op is None:
            return False
    if kind == "call_function":
        return target is op
    return getattr(Tensor, name, None) is op


@functools.cache
def _named(dotted: str) -> Any:
    """What a dotted name says in torch: `"torch.nn.functional.gelu"`, or `"functional.gelu"`; None if nothing."""
    path = operator.attrgetter(dotted.removeprefix("torch."))
    for root in (torch, nn) if "." in dotted else ():
        with contextlib.suppress(AttributeError):
            return path(root)
    return None


def call_name(kind: str, target: Any) -> str:
    """The dotted name of the function or method that a node of that kind and target calls."""
    if kind == "call_method":
        return f"torch.Tensor.{target}"
    return f"{getattr(target, '__module__', None) or 'torch'}.{getattr(target, '__name__', '')}"


def cone(node: fx.Node) -> set[fx.Node]:
    """A node, and all that it depends on."""
    found, waiting = set[fx.Node](), [node]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += one.all_input_nodes
    return found


def _is_pure(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    return torch_name(node) in _PURE and "out" not in node.kwargs
