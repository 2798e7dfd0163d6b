"""Which weights a following normalization makes scale-invariant: c·W gives the same output in train mode for all c > 0.

That holds up to the normalization's eps where every use of a layer's output goes into a normalization, directly or in
another shape. A bias must be absent; or a constant for each channel and taken out with the channel's mean; or else
scaled with the weight.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from . import calls
from .flows import arguments, called, read_value, uses
from .layers import is_plain_layer
from .module import CHILD

_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Bilinear,
    nn.Embedding,
)  # fmt: skip
"""What is linear in its weight, beside its bias. Not so their subclasses, which may do anything."""

_FUNCTIONS = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip
_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@dataclass(frozen=True)
class Invariant:
    """A weight that can be scaled without changing the output.

    Attributes:
        norms: the normalizations that take the scale out: paths of modules, or names of functions.
        biases: the ids of the biases that must be scaled with it.
    """

    norms: tuple[str, ...]
    biases: frozenset[int]


_UNUSED = Invariant((), frozenset())


def find_invariant(model: nn.Module, graphs: Iterable[fx.Graph]) -> dict[int, Invariant]:
    """By the weight's id, every weight that is scale-invariant wherever the graphs use it."""
    found: dict[int, Invariant | None] = {}
    for node in (node for graph in graphs for node in graph.nodes):
        for identity, invariant in _uses(model, node):
            found[identity] = _both(found.get(identity, _UNUSED), invariant)
    return {identity: invariant for identity, invariant in found.items() if invariant}


def _both(one: Invariant | None, other: Invariant | None) -> Invariant | None:
    if one is None or other is None:
        return None
    return Invariant(tuple(dict.fromkeys(one.norms + other.norms)), one.biases | other.biases)


def _uses(model: nn.Module, node: fx.Node) -> Iterator[tuple[int, Invariant | None]]:
    """Every use of a parameter that begins at a node; None where its scale matters, or may matter."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        is_known = type(module) in _LAYERS and is_plain_layer(module)
        for name, parameter in module.named_parameters():
            is_weight = is_known and name == "weight"
            yield id(parameter), _invariant(model, node, getattr(module, "bias", None)) if is_weight else None
    elif node.op == "get_attr":
        value = read_value(model, str(node.target))
        if isinstance(value, Tensor):
            for user in node.users:
                yield id(value), _functional(model, user, node)
        elif any(called(user) != "training" for user in node.users) and isinstance(value, nn.Module):
            yield from ((id(parameter), None) for parameter in value.parameters())
    elif node.target is calls.call_model:
        yield from ((id(parameter), None) for parameter in model.parameters())


def _functional(model: nn.Module, node: fx.Node, weight: fx.Node) -> Invariant | None:
    """What a function makes of a weight that it is given."""
    if called(node) not in _FUNCTIONS or node.op != "call_function":
        return None
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    bias = given.get("bias")
    if given.get("weight") is not weight or weight in (given.get("input"), bias):
        return None
    value = read_value(model, str(bias.target)) if isinstance(bias, fx.Node) and bias.op == "get_attr" else None
    return _invariant(model, node, value) if (bias is None or isinstance(value, Tensor)) else None


def _invariant(model: nn.Module, node: fx.Node, bias: Tensor | None) -> Invariant | None:
    """What becomes of the scale of a layer's output."""
    norms, centred = list[str](), list[bool]()
    for value, user in uses(model, node):
        takes_out = _removes_scale(model, user, value, None if bias is None else bias.numel())
        if takes_out is None:
            return None
        norms.append(str(user.target) if user.op == "call_module" else called(user))
        centred.append(takes_out)
    if not norms:
        return None
    return Invariant(tuple(norms), frozenset() if bias is None or all(centred) else frozenset({id(bias)}))


def _removes_scale(model: nn.Module, node: fx.Node, value: fx.Node, channels: int | None) -> bool | None:
    """None unless a node normalizes a value in train mode; else whether it also takes out a bias of so many numbers."""
    if node.op != "call_module":
        return _function_removes_scale(model, node, value, channels)
    module: Any = model.get_submodule(str(node.target))
    if not is_plain_layer(module) or [*node.args, *node.kwargs.values()] != [value]:
        return None
    match type(module):
        case kind if kind in _BATCH:
            own = module.running_mean is None or _normalizes_by_batch(model, module)
            return module.num_features == channels if own else None
        case kind if kind in _INSTANCE:
            return bool(module.num_features == channels)
        case nn.GroupNorm:
            return bool(module.num_groups == module.num_channels == channels)
        case nn.LayerNorm | nn.RMSNorm:
            return False
    return None


def _function_removes_scale(model: nn.Module, node: fx.Node, value: fx.Node, channels: int | None) -> bool | None:
    name = called(node)
    if not isinstance(node.target, torch._ops.OpOverload) and node.target is not getattr(F, name, None):
        return None
    given = arguments(node) or {}
    if given.pop("input", None) is not value or value in given.values():
        return None
    match name:
        case "batch_norm":
            own = given["running_mean"] is None or _is_training(model, given["training"])
            return _features(model, given) == channels if own else None
        case "instance_norm":
            return _features(model, given) == channels if _is_training(model, given["use_input_stats"]) else None
        case "group_norm":
            return bool(given["num_groups"] == _features(model, given) == channels)
        case "layer_norm" | "rms_norm" | "normalize":
            return False
    return None


def _is_training(model: nn.Module, mode: Any) -> bool:
    """Whether a mode is train mode when the model is in it."""
    if not isinstance(mode, fx.Node):
        return mode is True
    owner = mode.args[0] if called(mode) == "training" else None
    if not isinstance(owner, fx.Node) or owner.op != "get_attr":
        return False
    return _normalizes_by_batch(model, model if owner.target == CHILD else read_value(model, str(owner.target)))


def _normalizes_by_batch(model: nn.Module, module: Any) -> bool:
    """Not so where somebody has set it to evaluation while the model trains."""
    return bool(module.training or not model.training)


def _features(model: nn.Module, given: Mapping[str, Any]) -> int | None:
    """The number of channels of a normalization, if its arguments say so."""
    for name in ("weight", "running_mean"):
        node = given.get(name)
        value = read_value(model, str(node.target)) if isinstance(node, fx.Node) and node.op == "get_attr" else None
        if isinstance(value, Tensor):
            return value.numel()
    return None
