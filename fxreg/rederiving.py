"""What the rules make of a model's gradients, re-derived by their formulas: without a graph or an emitted operator.

The reference that `verify` compares with, and where it has to be taken for anything to show.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .controls import live_arguments, live_strengths
from .effects import Gradient, Penalty
from .joining import Joint
from .module import State
from .planning import Penalize, PullBack

Gradients: TypeAlias = Mapping[str, Tensor | None]
"""By the names of parameters and inputs."""
_STEP = 0.1
"""How far parameters are moved: any other place will do."""


def with_rules(
    state: State,
    gradients: Gradients,
    added: Gradients,
    beside: Gradients,
    weight: float | None,
    known: dict[Any, Tensor],
) -> dict[str, Tensor | None]:
    """The loss's gradients after the rules: those of penalties on activations, which pass the same way, transforms,
    and then those of the other penalties, on the function and on parameters; `weight` times where a node adds them.

    Those of penalties on parameters are taken from what is `known`, or else kept there.
    """
    plan = state.provenance.plan
    parameters = dict(state.model.named_parameters())
    result = {name: None if name in plan.frozen else gradient for name, gradient in gradients.items()}
    for name, more in added.items():
        if more is not None and weight is not None and name not in plan.frozen:
            result[name] = _sum(result[name], more * weight)
    for pulls in plan.pulls():
        if pulls[0].effect.definition.is_joint:
            result |= _jointly_pulled(state, pulls, result, parameters)
        elif (site := pulls[0].site) in result:
            result[site] = _pulled(state, pulls[0], result[site], parameters[site])
    for name, more in beside.items():
        if more is not None and weight is not None and name not in plan.frozen:
            result[name] = _sum(result[name], more * weight)
    for edit in plan.penalties:
        if edit.site in result and weight is not None:
            if (place := (edit.label, edit.site)) not in known:
                known[place] = _penalty_gradient(state, edit, parameters[edit.site])
            result[edit.site] = _sum(result[edit.site], known[place] * weight)
    return result


def _sum(before: Tensor | None, added: Tensor) -> Tensor:
    return added if before is None else before + added


def _pulled(state: State, pull: PullBack, grad: Tensor | None, weight: Tensor) -> Tensor | None:
    definition, scale = pull.effect.definition, state.loss_scale
    if grad is None:
        return None
    if isinstance(definition, Penalty):
        added = _penalty_gradient(state, pull, weight)
        return grad + added * scale.reshape(()).to(added)
    assert isinstance(definition, Gradient)
    if definition.detach:
        return None
    live = live_strengths(state, pull.label, pull.effect)
    if definition.has_stream:
        live["stream"] = state.get_buffer(state.provenance.streams[pull.label, pull.site])
    wide = torch.promote_types(grad.dtype, torch.float32)
    arguments = live_arguments(state, pull)
    pulled = definition.formula.transform(grad.to(wide), weight.detach().to(wide), scale, live, arguments)
    return pulled.to(grad.dtype)


def _jointly_pulled(
    state: State, pulls: tuple[PullBack, ...], gradients: Gradients, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The new gradients of those parameters of a joint transform that have one."""
    (label, effect), *_ = ((pull.label, pull.effect) for pull in pulls)
    found = {pull.site: grad for pull in pulls if (grad := gradients.get(pull.site)) is not None}
    if not found:
        return {}
    assert isinstance(effect.definition, Joint)
    grads = [grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in found.values()]
    weights = [parameters[site].detach().to(grad) for site, grad in zip(found, grads, strict=True)]
    live = live_strengths(state, label, effect)
    pulled = effect.definition.formula.transform(grads, weights, state.loss_scale, live, effect.arguments)
    return {site: new.to(old.dtype) for (site, old), new in zip(found.items(), pulled, strict=True)}


def _penalty_gradient(state: State, edit: Penalize | PullBack, weight: Tensor) -> Tensor:
    leaf = weight.detach().requires_grad_()
    (found,) = torch.autograd.grad(_value(state, edit, leaf), leaf, allow_unused=True)
    return torch.zeros_like(weight) if found is None else found


def _value(state: State, edit: Penalize | PullBack, weight: Tensor) -> Tensor:
    definition, live = edit.effect.definition, live_strengths(state, edit.label, edit.effect)
    assert isinstance(definition, Penalty)
    return definition.formula.value(weight, live, live_arguments(state, edit))


def objective(state: State, on_forward: Tensor | None) -> Tensor | None:
    """Σ s·R over every penalty node's parameter, by the formulas, and those on the forward call."""
    parameters = dict(state.model.named_parameters())
    terms = [_value(state, e, parameters[e.site].detach()) for e in state.provenance.plan.penalties]
    terms += [] if on_forward is None else [on_forward]
    return torch.stack([term.to(terms[0]) for term in terms]).sum() if terms else None


def silent(state: State) -> list[Tensor]:
    """The parameters at which a rule's penalty has no gradient, a bias of zeros or a weight at its anchor: whatever is
    wrong with such a penalty does not show there."""
    plan, parameters = state.provenance.plan, dict(state.model.named_parameters())
    pulls = (e for pulls in plan.pulls() for e in pulls if isinstance(e.effect.definition, Penalty))
    edits: Iterable[Penalize | PullBack] = (*plan.penalties, *pulls)
    sites = [(edit, parameters[edit.site]) for edit in edits if _can_move(parameters[edit.site])]
    return [weight for edit, weight in sites if not bool(_penalty_gradient(state, edit, weight).any())]


def muting(state: State, gradients: Gradients) -> list[Tensor]:
    """The parameters of zeros, if they may be why nothing arrives at a gradient transform, which then does not show."""
    sites = (edit.site for pulls in state.provenance.plan.pulls() for edit in pulls)
    if all((grad := gradients.get(site)) is None or bool(grad.any()) for site in sites):
        return []
    return [one for one in state.model.parameters() if _can_move(one) and not bool(one.any())]


@contextmanager
def moved(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Move parameters to another place for a while; graphs that were recorded before can still go backward."""
    kept = {one: one.detach().clone() for one in parameters}
    try:
        for one, before in kept.items():
            steps = torch.arange(1, one.numel() + 1, dtype=torch.float64, device=one.device).cos()
            one.data.copy_(before + _STEP * steps.reshape(one.shape).to(before))
        yield
    finally:
        for one, before in kept.items():
            one.data.copy_(before)


def _can_move(parameter: Tensor) -> bool:
    return parameter.requires_grad and not parameter.is_inference() and not hasattr(parameter, "device_mesh")
