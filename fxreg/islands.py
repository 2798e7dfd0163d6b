"""islands: modules inside one that runs as it is, each captured by itself.

What no graph can hold is mostly what a container does between its children: it drops layers at random, keeps a count,
looks at values. The children themselves a graph can hold. Each is captured as if it were the model, on the arguments
that it got when the model ran on its examples, and verified alone, hooks apart: they stay with the module.
"""

import collections
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import nn
from torch._C import _are_functorch_transforms_active  # private: no public way to ask

from .capture import Examples, Given, capture, run_examples, visible_layers
from .captured import Captured
from .emitting import verified
from .hidden_uses import leads_to
from .interception import calling
from .layers import is_layer, whole_reason
from .lowering import lower
from .module import RegularizedModule, stand_for, state_of
from .planning import Plan
from .side_channels import HOOKS
from .snapshots import borrowed
from .structure import fresh, map_tensors
from .watching import watch
from .writing import is_plain_argument

_LAYERS = 2
"""An island has at least so many layers with parameters in its graph: a single one is its own graph."""

_Calls: TypeAlias = dict[nn.Module, Given]


def islands(model: nn.Module, captured: Captured, example_inputs: Examples) -> dict[str, RegularizedModule]:
    """For the path of every module that can be captured in what stays whole: what was captured, with no rules in it.

    The outermost are taken, and then those inside what stays whole in these. Nobody's state is changed.
    """
    found: dict[str, RegularizedModule] = {}
    if isinstance(model, torch.jit.ScriptModule):
        return found
    waiting = list(_whole(captured))
    candidates = {inner for path in waiting for inner in model.get_submodule(path).modules() if _may_be_deep(inner)}
    calls = _observed(model, candidates - {model}, example_inputs) if candidates else {}
    while waiting:
        path = waiting.pop(0)
        module = model.get_submodule(path)
        if path in found or module not in candidates:
            continue
        island = _captured(module, calls[module]) if module in calls else None
        if island is None:
            inside: Iterable[str] = (name for name, _ in module.named_children())
        else:
            found[path] = island
            inside = _whole(state_of(island).captured)
        waiting += [f"{path}.{name}" if path else name for name in inside]
    return found


def _whole(captured: Captured) -> Iterable[str]:
    """The paths of the modules that run as they are in such calls; the last graph of several is for others."""
    chain = captured.chain
    found = [one for one in chain[:-1] if one.holds_in(("eager",))]
    return dict.fromkeys(path for one in found or chain[-1:] for path in one.opaque)


def _observed(model: nn.Module, modules: Collection[nn.Module], example_inputs: Examples) -> _Calls:
    """What modules were called with first, in training or else in evaluation, if that can be repeated."""
    calls: _Calls = {}

    def note(call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        is_plain_run = not torch.compiler.is_compiling() and not _are_functorch_transforms_active()
        is_wanted = is_plain_run and module in modules and module not in calls
        if is_wanted and all(map(is_plain_argument, (*args, *kwargs.values()))):
            calls[module] = Given(*map_tensors(fresh, (args, kwargs)))
        return call(module, *args, **kwargs)

    for training in (True, False):
        with borrowed(model, training=training), calling(note), suppress(Exception):  # what came before it counts
            run_examples(model, example_inputs)
    return calls


def _captured(module: nn.Module, examples: Given) -> RegularizedModule | None:
    """A module's forward by itself, if a graph holds more than one of its layers, and does what it does."""
    if is_layer(module) or leads_to(module):  # a stand-in would not be met there
        return None
    bare = _without_hooks(module)
    if whole_reason(bare, runs=True):
        return None
    try:
        captured = capture(bare, examples)
        if not _is_deep(bare, captured.graph):
            return None
        island = verified(lower(bare, _of_forward(captured), Plan(()), "backward"), bare, examples)
    except Exception:  # whatever it is, the module runs as it is
        return None
    stand_for(island, module)
    watch(island)
    return island if _is_deep(module, state_of(island).captured.graph) else None


def _of_forward(captured: Captured) -> Captured:
    """What was captured as a part of a module's call: what is around the forward may change."""
    remembered = (replace(one, hooks=one.hooks if one.path else None) for one in captured.remembered)
    otherwise = captured.otherwise and _of_forward(captured.otherwise)
    return replace(captured, remembered=tuple(remembered), otherwise=otherwise)


def _is_deep(module: nn.Module, graph: Any) -> bool:
    return len(visible_layers(module, graph)) >= _LAYERS


def _may_be_deep(module: nn.Module) -> bool:
    owners = sum(bool(inner._parameters) for inner in module.modules())
    return owners >= _LAYERS and not isinstance(module, torch.jit.ScriptModule)


def _without_hooks(module: nn.Module) -> nn.Module:
    """A stand-in with the same class, parameters, buffers and children, and a mode and attributes of its own."""
    bare = object.__new__(type(module))
    vars(bare).update(vars(module))
    vars(bare).update({kind: collections.OrderedDict() for kind in HOOKS})
    return bare
