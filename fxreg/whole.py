"""What one compiled training step holds: loss, gradients, penalties, update, proximal step. It is traced, not run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from . import calls, operators
from .effects import Penalty
from .errors import FxregError
from .module import RegularizedModule, state_of
from .planning import Emit, Penalize
from .proximal import Move

Job: TypeAlias = tuple[Tensor, dict[str, Tensor], dict[str, bool], list[Move]]
"""A parameter, the optimizer's state for it, what decides its formula, and the proximal operators behind it."""

Group: TypeAlias = tuple[tuple[str, ...], Tensor, list[Job]]
"""The names of numbers, the numbers, and the parameters that they are for."""

Live: TypeAlias = tuple[list[Tensor], dict[str, Tensor]]
"""The tensors of a penalty, by position and by name."""

Gradients: TypeAlias = Sequence[Tensor | None]


@dataclass(frozen=True)
class Term:
    """A penalty on a parameter, as a graph has it: its operator, where its tensors are, and its other arguments."""

    operator: Callable[..., Tensor]
    paths: tuple[str, ...]
    named_paths: Mapping[str, str]
    arguments: Mapping[str, Any]

    def live(self, gm: RegularizedModule) -> Live:
        named = {name: attrgetter(path)(gm) for name, path in self.named_paths.items()}
        return [attrgetter(path)(gm) for path in self.paths], named


def separable_terms(gm: RegularizedModule) -> tuple[Term, ...] | None:
    """The penalties of an emitted module, if each is on a parameter; otherwise nothing."""
    penalties = [edit.effect.definition for edit in state_of(gm).provenance.plan.edits if isinstance(edit, Penalize)]
    known = {definition.operator.overloadpacket for definition in penalties if isinstance(definition, Penalty)}
    place = {calls.attach: 1, operators.total: 0}
    nodes: list[Any] = [t for node in gm.graph.nodes if node.target in place for t in node.args[place[node.target]]]
    # By the packet: what a formula means may have changed since, and with it the overload.
    packets = {getattr(node.target, "overloadpacket", None) for node in nodes}
    if not packets <= known or any(n.op != "get_attr" for node in nodes for n in node.all_input_nodes):
        return None
    return tuple(_term(node) for node in nodes)


def _term(node: Any) -> Term:
    named = {name: str(value.target) for name, value in node.kwargs.items() if isinstance(value, fx.Node)}
    constants = {name: value for name, value in node.kwargs.items() if name not in named}
    # Only the gradient is wanted: with a closed form, the formula itself is not run.
    return Term(node.target, tuple(str(n.target) for n in node.args), named, {**constants, "value": False})


@dataclass(frozen=True)
class WholeStep:
    """One step, as a function of everything that changes from one to the next.

    Attributes:
        terms: the penalties whose gradients are taken apart from the loss's; without them all go through the loss.
        update: the optimizer's formula.
    """

    gm: RegularizedModule
    loss_fn: Callable[..., Tensor]
    emit: Emit
    terms: tuple[Term, ...] | None
    update: Callable[..., None]

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        targets: tuple[Any, ...],
        zero: Tensor,
        live: list[Live],
        groups: list[Group],
    ) -> tuple[Tensor, tuple[bool, ...]]:
        """Change parameters and states in place.

        Args:
            zero: a tensor that requires a gradient; it stands for the penalties in the loss.

        Returns:
            The loss, and for every parameter whether it had a gradient.
        """
        parameters = [parameter for _, _, jobs in groups for parameter, *_ in jobs]
        with torch.enable_grad():
            loss = self._loss(args, kwargs, targets, zero)
            with operators.without_autocast(loss.device):
                *found, factor = torch.autograd.grad(loss, [*parameters, zero], allow_unused=True)
                if self.emit == "backward":
                    factor = state_of(self.gm).loss_scale
                gradients = self._with_penalties(found, parameters, live, factor)
        remaining = iter(gradients)
        with torch.no_grad(), operators.without_autocast(loss.device):
            for names, numbers, jobs in groups:
                named = dict(zip(names, numbers.unbind(), strict=True))
                for parameter, state, switches, moves in jobs:
                    gradient = next(remaining)
                    if gradient is None:
                        continue
                    state = {k: one if one.shape == parameter.shape else one.reshape(()) for k, one in state.items()}
                    self.update(parameter, gradient, state, named, switches)
                    for formula, strengths, arguments in moves:
                        (new,) = formula.moved([parameter], named["lr"], strengths, arguments)
                        parameter.copy_(new)
        return loss.detach(), tuple(gradient is not None for gradient in gradients)

    def _loss(self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: tuple[Any, ...], zero: Tensor) -> Tensor:
        penalty = None
        try:
            calls.apart.zero, calls.apart.met = None if self.terms is None else zero, 0
            output = self.gm(*args, **kwargs)
            if calls.apart.met > (1 if self.terms and self.emit != "output" else 0):
                raise FxregError(
                    "train_step: the model calls another module that fxreg.transform returned, whose penalties the "
                    "step does not know. Put its rules into this one's, or use the ordinary loop."
                )
            if self.emit == "output":
                output, penalty = output
                penalty = calls.apart.value(penalty)
        finally:
            calls.apart.zero = None
        loss = self.loss_fn(output, *targets)
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise FxregError(f"train_step: loss_fn must return a 0-d tensor, got {got}.")
        return loss if penalty is None else loss + penalty.to(loss.device)

    def _with_penalties(
        self, gradients: Gradients, parameters: list[Tensor], live: list[Live], factor: Tensor | None
    ) -> Gradients:
        """The gradients of the loss with those of the penalties, `factor` times."""
        if not self.terms or factor is None:
            return gradients
        values = [
            term.operator(*tensors, **named, **term.arguments)
            for term, (tensors, named) in zip(self.terms, live, strict=True)
        ]
        values = [value for value in values if value.requires_grad]
        if not values:
            return gradients
        # Subtracting the negative: Inductor turns `mm + r` into addmm, which writes r and reads it back.
        seeds = [-factor.reshape(()).to(value) for value in values]
        negative = torch.autograd.grad(values, parameters, seeds, allow_unused=True)
        return [_minus(grad, other) for grad, other in zip(gradients, negative, strict=True)]


def _minus(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if right is None:
        return left
    return -right if left is None else left - right
