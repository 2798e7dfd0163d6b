"""What an emitted module is asked before it runs, and what it warns of in eager mode."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._C import _are_functorch_transforms_active  # private: no public way to ask

from .captured import way
from .effects import Penalty
from .errors import CaptureError
from .guarding import ask
from .module import RegularizedModule, State, heeds, own, state_of
from .planning import PullBack
from .rematching import difference
from .structure import tensors

_BACKWARDS_WATCHED = 8
_DONE = 1_000_000


def watch(gm: RegularizedModule) -> None:
    """Register the hooks that an emitted module needs."""
    state = state_of(gm)
    passing = state.captured.chain[-1].passing
    if passing is not None and (passing.is_told or state.captured.needs_model):  # elsewhere hooks are compared
        gm.register_forward_pre_hook(own(_refuse_passed), with_kwargs=True)
    if state.captured.remembered or state.meaning:
        gm.register_forward_pre_hook(own(_refuse_changed))
    if state.unbound():
        gm.register_forward_pre_hook(own(_warn_unbound))
    if _injected(state):
        gm.register_forward_hook(own(_watch_accumulation))


def _injected(state: State) -> list[str]:
    """The parameters to whose gradients the backward pass adds a penalty's."""
    plan = state.provenance.plan
    added = [edit for edit in plan.edits if isinstance(edit, PullBack) and isinstance(edit.effect.definition, Penalty)]
    attached = plan.penalties if state.provenance.emit == "backward" else ()
    if plan.on_forward and state.provenance.emit == "backward":  # they reach whatever lies before them
        return [name for name, _ in state.model.named_parameters()]
    return [edit.site for edit in (*attached, *added)]


def _is_eager_training(module: nn.Module) -> bool:
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and module.training
        and not _are_functorch_transforms_active()
    )


def _refuse_passed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    state = state_of(module)
    passing = state.captured.chain[-1].passing
    if passing is not None:
        passing.check(None if state.is_island else state.model, args, kwargs)


def _refuse_changed(module: nn.Module, args: Any) -> None:
    if what := ask(difference, _heeds, module, way()):
        raise CaptureError(what)


def _heeds(module: nn.Module, thing: Any, names: Sequence[str]) -> bool:
    return thing is module._modules or heeds(state_of(module), thing, names)


def _warn_unbound(module: nn.Module, args: Any) -> None:
    if not _is_eager_training(module):
        return
    state = state_of(module)
    waiting = state.unbound()
    if waiting and not state.warned_unbound:
        state.warned_unbound = True
        for via, companion in (("optimizer", "param_groups"), ("proximal", "ProximalStep")):
            if labels := [repr(label) for label, by in waiting.items() if by == via]:
                warnings.warn(
                    f"fxreg: rules {', '.join(labels)} act through the optimizer, but fxreg.{companion} was never "
                    "called with them, so they do nothing.",
                    stacklevel=2,
                )


def _watch_accumulation(module: nn.Module, args: Any, output: Any) -> None:
    if not _is_eager_training(module):
        return
    state = state_of(module)
    if state.scale_was_set or state.backwards_watched >= _BACKWARDS_WATCHED:
        return
    node = next((tensor.grad_fn for tensor in tensors(output) if tensor.grad_fn is not None), None)
    if node is not None:
        node.register_prehook(lambda grads: _check_accumulation(state))


def _check_accumulation(state: State) -> None:
    """At the start of a backward pass: where a gradient is already there, look at its end whether it was added to."""
    state.backwards_watched += 1
    parameters = dict(state.model.named_parameters())
    found = (parameters[site] for site in _injected(state) if site in parameters)  # others may stand in for them now
    parameter = next((p for p in found if p.requires_grad and p.grad is not None), None)
    if state.scale_was_set or parameter is None or parameter.grad is None or not bool(parameter.grad.any()):
        return
    before, version = parameter.grad, parameter.grad._version

    def finish() -> None:
        if parameter.grad is not before or before._version != version:  # not so in torch.autograd.grad
            _warn_accumulation(state)

    torch.autograd.Variable._execution_engine.queue_callback(finish)


def _warn_accumulation(state: State) -> None:
    if state.backwards_watched < _DONE:
        state.backwards_watched = _DONE
        warnings.warn(
            "fxreg: gradients accumulate over several backward passes, and each adds the penalties' gradient in full. "
            "Call fxreg.set_loss_scale(gm, 1 / accumulation_steps), with the factor by which you scale the loss; 1 if "
            "several times is what you mean.",
            stacklevel=2,
        )
