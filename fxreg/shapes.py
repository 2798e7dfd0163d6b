"""Where the size of a value comes from, as far as that follows from what computed it.

Only rules that hold for all shapes: a question about the size of a value deep inside a model becomes one about the
model's arguments, and can be answered before the model runs.
"""

import operator
from typing import Any, TypeAlias

import torch
from torch import fx, nn

Size: TypeAlias = "tuple[fx.Node, int] | fx.Node | int"
"""A dimension of a node's value, a node that computed a number, or a number."""

RANK = "fxreg_rank"
"""In a node's `meta`: the number of dimensions of its value."""

SHAPE = "fxreg_shape"
"""In the `meta` of a read of a parameter or buffer whose shape is assumed to stay: that."""

FITS = "fxreg_fits"
"""In the `meta` of an indexing: the dimensions along which a slice `[:n]` is assumed to find n or more."""

LAYER = "fxreg_layer"
"""In the `meta` of a call of a layer of torch's in which nothing of the user's runs: its class."""

_NUMBERS = {operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg}
_ALIKE = (
    nn.Dropout, nn.LayerNorm, nn.Identity, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softmax, nn.RMSNorm,
)  # fmt: skip
_ALIKE_BUT_LAST = (nn.Linear, nn.Embedding)
_UNARY = {
    "to", "float", "contiguous", "clone", "detach", "dropout", "gelu", "relu", "silu", "tanh", "sigmoid", "softmax",
    "neg", "exp", "rsqrt", "sqrt", "layer_norm", "rms_norm", "type_as", "abs", "log", "half", "bfloat16", "double",
}  # fmt: skip
_BINARY = {"add", "sub", "mul", "div", "truediv", "pow", "rsub"}


def source(node: fx.Node, dim: int, known: dict[tuple[fx.Node, int], Size] | None = None) -> Size:
    """Where the size of a node's value along a dimension comes from; at worst, from there."""
    known = {} if known is None else known
    if (node, dim) not in known:
        known[node, dim] = (node, dim)
        known[node, dim] = _source(node, dim, known)
    return known[node, dim]


def _source(node: fx.Node, dim: int, known: dict[tuple[fx.Node, int], Size]) -> Size:
    rank = node.meta.get(RANK)
    if SHAPE in node.meta:
        return int(node.meta[SHAPE][dim])
    first = node.args[0] if node.args else None
    if rank is None or not isinstance(first, fx.Node) or RANK not in first.meta:
        return node, dim
    if node.op == "call_module":
        kind = node.meta.get(LAYER)
        alike = kind in _ALIKE or (kind in _ALIKE_BUT_LAST and dim < rank - 1)
        return source(first, dim, known) if alike else (node, dim)
    name = torch_name(node)
    if name in _UNARY or (name.endswith("_") and not name.endswith("__")):
        return source(first, dim, known)
    if name == "embedding":
        return source(first, dim, known) if dim < rank - 1 else (node, dim)
    if name in ("view", "reshape", "new_zeros", "new_ones", "new_empty"):
        return _said(node, dim, rank, known)
    if name in _BINARY:
        return _of_two(node, dim, rank, known)
    if name == "getitem":
        return _of_index(node, dim, known)
    if name == "transpose" and len(node.args) == 3:
        one, other = (int(d) % rank for d in node.args[1:])  # type: ignore[arg-type]
        return source(first, {one: other, other: one}.get(dim, dim), known)
    if name == "unsqueeze" and len(node.args) == 2:
        at = int(node.args[1]) % rank  # type: ignore[arg-type]
        return 1 if dim == at else source(first, dim - (dim > at), known)
    return node, dim


_FIXED_RANK = {
    "cat", "stack", "linear", "matmul", "expand", "permute", "sum", "mean", "cumsum", "eq", "ne", "lt", "le", "gt",
    "ge", "masked_fill", "where", "arange", "ones", "zeros", "full", "ones_like", "zeros_like", "flip", "roll", "pad",
    "conv1d", "conv2d", "view", "reshape", "transpose", "unsqueeze", "embedding", "contiguous", "bmm", "baddbmm",
    "scaled_dot_product_attention", "new_zeros", "new_ones", "new_empty", "logical_not", "bool", "long", "int", "split",
    "chunk", "addmm", "unpack", "cos", "sin", "pow", "rsqrt", "silu", "group_norm", "batch_norm", "interpolate",
    "cross_entropy",
}  # fmt: skip


def has_fixed_rank(node: fx.Node) -> bool:
    """Whether the number of dimensions of a node's value follows from those of the model's arguments."""
    waiting, seen = [node], {node}
    while waiting:
        one = waiting.pop()
        if one.op in ("placeholder", "get_attr") or one.target in ("size", "dim"):
            continue
        if one.op == "call_module":
            if LAYER not in one.meta:
                return False
        elif one.op in ("call_function", "call_method"):
            name = torch_name(one)
            in_place = name.endswith("_") and not name.endswith("__")
            known = in_place or name in _FIXED_RANK | _UNARY | _BINARY or one.target in _NUMBERS
            if not known and not (name == "getitem" and _is_plain_index(one.args[1])):
                return False
        waiting += [each for each in one.all_input_nodes if each not in seen]
        seen.update(one.all_input_nodes)
    return True


def has_fixed_shape(node: fx.Node) -> bool:
    """Whether the shape of a node's value follows from the shapes, not the values, of what it is computed from."""
    name = torch_name(node)
    if name == "getitem":
        return _is_plain_index(node.args[1])
    return name not in ("item", "bool", "contains", "unpack") and not (name == "where" and len(node.args) == 1)


def _is_plain_index(index: Any) -> bool:
    """Whether an index has as many dimensions whatever the values: numbers, slices, None, and an ellipsis."""
    parts = index if isinstance(index, tuple) else (index,)
    return not any(isinstance(part, fx.Node | list) for part in parts)


def sliced(index: Any, rank: int) -> list[tuple[int, slice] | None]:
    """For every dimension of what a plain index takes of a value of a rank: its dimension there, and the slice along
    it; None for a new one."""
    parts = index if isinstance(index, tuple) else (index,)
    rest = [slice(None)] * (rank - sum(part is not None and part is not ... for part in parts))
    at = parts.index(...) if any(part is ... for part in parts) else len(parts)
    found: list[tuple[int, slice] | None] = []
    dim = 0
    for part in (*parts[:at], *rest, *parts[at + 1 :]):
        if part is None:
            found.append(None)
            continue
        if isinstance(part, slice):
            found.append((dim, part))
        dim += 1
    return found


def _of_index(node: fx.Node, dim: int, known: dict[tuple[fx.Node, int], Size]) -> Size:
    """The size of what is taken by numbers, slices, None and an ellipsis."""
    value, index = node.args
    if not _is_plain_index(index):
        return node, dim
    taken = sliced(index, value.meta[RANK])[dim]  # type: ignore[union-attr]
    if taken is None:
        return 1
    at, part = taken
    if part == slice(None):
        return source(value, at, known)  # type: ignore[arg-type]
    return _number(part.stop, known) if at in node.meta.get(FITS, ()) else (node, dim)


def _number(size: fx.Node, known: dict[tuple[fx.Node, int], Size]) -> Size:
    """A size as it was told."""
    if size.target == "size" and isinstance(size.args[0], fx.Node):
        return source(size.args[0], int(size.args[1]), known)  # type: ignore[arg-type]
    return size


def torch_name(node: fx.Node) -> str:
    """The name of the torch function or method that a node calls; "" for an operator of somebody else's."""
    if isinstance(node.target, str):
        return node.target if node.op == "call_method" else ""
    if isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return ""
    return str(getattr(node.target, "__name__", ""))


def _of_two(node: fx.Node, dim: int, rank: int, known: dict[tuple[fx.Node, int], Size]) -> Size:
    """The size of what is broadcast: of the only one that has the dimension, or of both if they agree."""
    if len(node.args) != 2:
        return node, dim
    ranks = [(one, one.meta.get(RANK)) if isinstance(one, fx.Node) else (one, 0) for one in node.args]
    if any(r is None for _, r in ranks):
        return node, dim
    found = {source(one, dim - (rank - r), known) for one, r in ranks if r and dim >= rank - r}  # type: ignore[arg-type]
    found = found - {1} or found
    return found.pop() if len(found) == 1 else (node, dim)


def _said(node: fx.Node, dim: int, rank: int, known: dict[tuple[fx.Node, int], Size]) -> Size:
    """A size that a call was told, all by position."""
    sizes: Any = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        (sizes,) = sizes
    if len(sizes) != rank:
        return node, dim
    size = sizes[dim]
    if isinstance(size, fx.Node):
        return _number(size, known)
    return size if isinstance(size, int) and size >= 0 else (node, dim)
