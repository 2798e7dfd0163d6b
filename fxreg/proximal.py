"""The step after the optimizer's: proximal operators and projections of the rules that act by them."""

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .controls import live_arguments, live_strengths
from .effects import Effect
from .errors import RuleError
from .formulas import ProximalFormula
from .module import emitted, state_of, stepping
from .planning import LeaveToCompanion
from .rematching import check_meaning
from .updates import has_moved, is_done

_OTHER_STEPS = (torch.optim.LBFGS, torch.optim.Rprop, torch.optim.ASGD, torch.optim.Adafactor)
"""The optimizers whose steps are not of the size that `lr` in their groups says."""
_TOGETHER = 1 << 20
"""About how many elements are computed at once: enough to be worth a launch, and no second copy of a large model."""


Move: TypeAlias = tuple[ProximalFormula, dict[str, Tensor], dict[str, Any]]
"""What a rule does to a parameter: its formula, the strengths, and the other arguments, as they are now."""


@dataclass(frozen=True)
class _Operator:
    """What one rule does: an effect's operator, and the parameters it acts on."""

    label: str
    effect: Effect
    arguments: dict[str, Any]
    formula: ProximalFormula
    weights: dict[Tensor, LeaveToCompanion]

    def batches(self, weights: list[Tensor]) -> Iterable[list[Tensor]]:
        """Some of its weights, as the formula takes them: several of one device and dtype, or one by one."""
        if not self.formula.foreach or self.formula.anchors:
            return [[weight] for weight in weights]
        found: dict[tuple[torch.device, torch.dtype, int], list[Tensor]] = {}
        total = 0
        for weight in weights:
            total += weight.numel()
            found.setdefault((weight.device, weight.dtype, total // _TOGETHER), []).append(weight)
        return found.values()


class ProximalStep:
    """Carries out the `via="proximal"` rules: a hook that acts after each `optimizer.step()`, until `remove()`.

    Every parameter of such a rule becomes prox(w) = argmin_u ½‖u − w‖² + lr·s·R(u), with its group's learning rate
    and the strength as they are then; of a constraint, the nearest point that is allowed. Rules on one parameter act
    one after the other, in their order. Parameters without a gradient stay as they are, as they do in the optimizer's
    own step; so do all of them in a step that a GradScaler skips. 16-bit parameters are computed in float32.

    With plain SGD this is proximal gradient descent on loss + s·R: weights become exactly 0. With `momentum=m` its
    step is 1/(1−m) times as large in the long run, but the operator's is not, which leaves the strength s·(1−m): give
    `dampening=m` too, or a strength of s/(1−m). After Adam's step, or that of another optimizer that scales gradients,
    it is the same operator in the same plain metric, and no minimizer of loss + s·R in particular.

    Args:
        optimizer: has all trainable parameters of these rules. Its groups say `lr`, as a number or a 0-d tensor, and
            its steps are of that size: not LBFGS, Rprop, ASGD, or Adafactor.
        gm: what `fxreg.transform` returned, compiled or not.

    Raises:
        RuleError: no optimizer, or one of these; a parameter that it does not have; no rule of `gm` with
            `via="proximal"`; a second time with the same two; later, at a step, a parameter that was replaced.
        FxregError: not a module that `fxreg.transform` returned.
        CaptureError: the model changed, and the rules mean something else.

    >>> import torch, fxreg
    >>> model = torch.nn.Linear(4, 1)
    >>> gm = fxreg.transform(model, [fxreg.Rule(fxreg.l1(100.0), param="weight", via="proximal")])
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> step = fxreg.ProximalStep(optimizer, gm)
    >>> gm(torch.ones(2, 4)).sum().backward()
    >>> optimizer.step()
    >>> int(model.weight.count_nonzero())
    0
    >>> step.remove()

    Source: Beck and Teboulle (2009), "A fast iterative shrinkage-thresholding algorithm", eq. 1.4; Parikh and Boyd
    (2014), "Proximal algorithms".
    """

    def __init__(self, optimizer: torch.optim.Optimizer, gm: nn.Module) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise RuleError(f"ProximalStep: optimizer must be a torch.optim.Optimizer, got {optimizer!r}.")
        self._state = state_of(gm)
        edits = self._state.provenance.plan.companions("proximal")
        if not edits:
            raise RuleError(
                "ProximalStep: no rule of this module has via='proximal'. Give it to a Rule before fxreg.transform, or "
                "leave ProximalStep out."
            )
        check_meaning(emitted(gm))
        parameters = dict(emitted(gm).named_parameters())
        _check(optimizer, edits, parameters)
        if any(one._optimizer() is optimizer for one in stepping(self._state)):
            raise RuleError(
                "ProximalStep: this optimizer has one for this module already, and two would act twice. Call its "
                "remove() first."
            )
        self._operators = tuple(_operators(edits, parameters))
        self._optimizer = weakref.ref(optimizer)
        self._handle = optimizer.register_step_post_hook(self._after_step)
        stepping(self._state).add(self)

    def remove(self) -> None:
        """Act no more: the rules are unbound again."""
        self._handle.remove()
        stepping(self._state).discard(self)

    def _check_parameters(self) -> None:
        """Raise where the model has another parameter by now, which nothing would happen to."""
        now = dict(self._state.model.named_parameters(remove_duplicate=False))
        for operator in self._operators:
            for weight, edit in operator.weights.items():
                other = now.get(edit.site)
                if other is weight or (hasattr(weight, "device_mesh") and not hasattr(other, "device_mesh")):
                    continue  # sharded, and gathered for a forward pass
                raise RuleError(
                    f"ProximalStep: rule {operator.label!r} acts on {edit.site!r}, and the model has another parameter "
                    "there than when the step was made. Call remove(), and make a new one with the optimizer."
                )

    def moves(self) -> dict[Tensor, list[Move]]:
        """What happens to every parameter, in the order of the rules; for a step that does it by itself."""
        self._check_parameters()
        found: dict[Tensor, list[Move]] = {}
        for operator in self._operators:
            live = live_strengths(self._state, operator.label, operator.effect)
            for weight, edit in operator.weights.items():
                found.setdefault(weight, []).append((operator.formula, live, self._given(operator, edit)))
        return found

    def _given(self, operator: _Operator, edit: LeaveToCompanion) -> dict[str, Any]:
        return live_arguments(self._state, edit) if operator.formula.anchors else operator.arguments

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any = (), kwargs: Any = None) -> None:
        if is_done(optimizer, self):
            return
        self._check_parameters()
        # A fused optimizer is called also for a step that its GradScaler skips, and told by a tensor.
        skipped: Tensor | None = getattr(optimizer, "found_inf", None)
        for operator in self._operators:
            live = live_strengths(self._state, operator.label, operator.effect)
            for group in optimizer.param_groups:
                weights = [p for p in group["params"] if p in operator.weights and has_moved(optimizer, p)]
                for batch in operator.batches(weights):
                    edit = operator.weights[batch[0]]
                    try:
                        new = operator.formula.moved(batch, group["lr"], live, self._given(operator, edit))
                    except RuleError as error:
                        raise RuleError(
                            f"rule {operator.label!r}: the proximal operator of {operator.effect.name} at "
                            f"{edit.site!r}: {error}."
                        ) from None
                    if skipped is not None:
                        new = [
                            torch.where(skipped.to(old.device) > 0, old, one)
                            for old, one in zip(batch, new, strict=True)
                        ]
                    _copy(batch, new)


def leading(optimizer: torch.optim.Optimizer) -> list[ProximalStep]:
    """The proximal steps that nothing else behind the optimizer's step comes before."""
    found = []
    for hook in optimizer._optimizer_step_post_hooks.values():
        owner = getattr(hook, "__self__", None)
        if type(owner) is not ProximalStep:  # a subclass may do something else
            break
        found.append(owner)
    return found


def _copy(weights: list[Tensor], new: list[Tensor]) -> None:
    if any(hasattr(weight, "device_mesh") for weight in weights):  # sharded: there is no such operator for them
        for weight, one in zip(weights, new, strict=True):
            weight.copy_(one)
    else:
        torch._foreach_copy_(weights, new)


def _operators(edits: Iterable[LeaveToCompanion], parameters: dict[str, nn.Parameter]) -> Iterator[_Operator]:
    """The rules, in their order."""
    labels: dict[str, list[LeaveToCompanion]] = {}
    for edit in edits:
        labels.setdefault(edit.label, []).append(edit)
    for label, own in labels.items():
        formula = own[0].effect.definition.prox
        assert formula is not None
        effect = own[0].effect
        yield _Operator(label, effect, dict(effect.arguments), formula, {parameters[edit.site]: edit for edit in own})


def _check(
    optimizer: torch.optim.Optimizer, edits: Iterable[LeaveToCompanion], parameters: dict[str, nn.Parameter]
) -> None:
    name = type(optimizer).__name__
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for edit in edits:
        who = f"ProximalStep: rule {edit.label!r}"
        if isinstance(optimizer, _OTHER_STEPS):
            raise RuleError(
                f"{who} takes a step of the size of the learning rate, and {name}'s steps are of other sizes. Use SGD, "
                "or an optimizer of Adam's kind; or via='penalty' where the effect has it."
            )
        parameter = parameters[edit.site]
        if parameter in groups and "lr" not in groups[parameter]:
            raise RuleError(
                f"{who} takes a step of the size of the learning rate, and {name}'s group of {edit.site!r} has no 'lr'."
            )
        if parameter.requires_grad and parameter not in groups:
            raise RuleError(
                f"{who} acts on {edit.site!r}, which is not among the parameters of this {name}. Add it, or leave it "
                f"out with exclude={edit.site!r}."
            )
