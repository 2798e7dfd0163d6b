"""Where the size of a value comes from, as far as that follows from what computed it.

Only rules that hold for all shapes: a question about the size of a value deep inside a model becomes one about the
model's arguments, and can be answered before the model runs.
"""

from typing import Any, TypeAlias

from torch import fx, nn

Size: TypeAlias = "tuple[fx.Node, int] | fx.Node | int"
"""A dimension of a node's value, a node that computed a number, or a number."""

RANK = "fxreg_rank"
"""In a node's `meta`: the number of dimensions of its value."""

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
    first = node.args[0] if node.args else None
    if rank is None or not isinstance(first, fx.Node) or RANK not in first.meta:
        return node, dim
    if node.op == "call_module":
        kind = node.meta["nn_module_stack"][node.target][1]
        alike = kind in _ALIKE or (kind in _ALIKE_BUT_LAST and dim < rank - 1)
        return source(first, dim, known) if alike else (node, dim)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in _UNARY or (name.endswith("_") and not name.endswith("__")):
        return source(first, dim, known)
    if name == "embedding":
        return source(first, dim, known) if dim < rank - 1 else (node, dim)
    if name in ("new_zeros", "new_ones", "new_empty"):
        return _said((node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:])[dim], node, dim, known)
    if name in _BINARY:
        return _of_two(node, dim, rank, known)
    if name in ("view", "reshape"):
        sizes = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
        return _said(sizes[dim], node, dim, known)
    if name == "transpose" and len(node.args) == 3:
        one, other = (int(d) % rank for d in node.args[1:])  # type: ignore[arg-type]
        return source(first, {one: other, other: one}.get(dim, dim), known)
    if name == "unsqueeze" and len(node.args) == 2:
        at = int(node.args[1]) % rank  # type: ignore[arg-type]
        return 1 if dim == at else source(first, dim - (dim > at), known)
    return node, dim


def _of_two(node: fx.Node, dim: int, rank: int, known: dict[tuple[fx.Node, int], Size]) -> Size:
    """The size of what is broadcast: of the only one that has the dimension, or of both if they agree."""
    if len(node.args) != 2:
        return node, dim
    ranks = [(one, one.meta.get(RANK)) if isinstance(one, fx.Node) else (one, 0) for one in node.args]
    if any(r is None for _, r in ranks):
        return node, dim
    found = {source(one, dim - (rank - r), known) for one, r in ranks if r and dim >= rank - r}  # type: ignore[arg-type]
    return found.pop() if len(found) == 1 else (node, dim)


def _said(size: Any, node: fx.Node, dim: int, known: dict[tuple[fx.Node, int], Size]) -> Size:
    """A size that a view was told."""
    if isinstance(size, fx.Node):
        if size.target == "size" and isinstance(size.args[0], fx.Node):
            return source(size.args[0], int(size.args[1]), known)  # type: ignore[arg-type]
        return size
    return size if isinstance(size, int) and size >= 0 else (node, dim)
