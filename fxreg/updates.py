"""How optimizers change a parameter: torch's SGD, Adam and AdamW as formulas that a compiled step can hold.

`torch.optim.sgd.sgd` and its like add with `grad.add(w, alpha=d)`. In one graph with the matrix product that made the
gradient, Inductor (torch 2.13) fuses that into `addmm` and drops the d, silently. So the formulas stand here, without
an `alpha`; the tests compare them with torch's optimizers, option by option.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .errors import FxregError
from .operators import accumulation_dtype

State = dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """One class of optimizer.

    Attributes:
        formula: (parameter, gradient, state, learning rate, whether the state is new, **options) → nothing; changes the
            parameter and its state in place.
        names: what the state of a parameter of a group has.
        prepared: (parameter, its group) → the state that the optimizer gives a parameter at first.
        options: what the formula reads from the group, beside the learning rate.
    """

    formula: Callable[..., None]
    names: Callable[[Mapping[str, Any]], tuple[str, ...]]
    prepared: Callable[[Tensor, Mapping[str, Any]], State]
    options: tuple[str, ...]

    def read(self, group: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The options of one group, as constants of the graph.

        Raises:
            FxregError: one that the formula does not have.
        """
        where = f"train_step: param_groups[{number}]"
        if group["differentiable"]:
            raise FxregError(
                f"{where} has differentiable=True, and a compiled step is not differentiated. Leave it out, or use the "
                "ordinary loop."
            )
        found = {name: group[name] for name in self.options}
        for name, value in found.items():
            if any(isinstance(part, Tensor) for part in (value if isinstance(value, tuple) else (value,))):
                raise FxregError(f"{where}[{name!r}] is a tensor; only lr may be one. Make it a number.")
        return found


def _sgd(
    parameter: Tensor,
    grad: Tensor,
    state: State,
    rate: Tensor,
    is_new: bool,
    *,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    weight, grad, rate = _wide(parameter, grad, rate)
    grad = -grad if maximize else grad
    if weight_decay != 0:
        grad = grad - (-weight_decay) * weight
    if momentum != 0:
        buffer = state["momentum_buffer"]
        velocity = grad if is_new and dampening != 0 else momentum * buffer.to(grad) - (dampening - 1) * grad
        buffer.copy_(velocity)
        grad = grad - (-momentum) * velocity if nesterov else velocity
    parameter.copy_(weight - rate * grad)


def _sgd_names(group: Mapping[str, Any]) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] != 0 else ()


def _sgd_prepared(parameter: Tensor, group: Mapping[str, Any]) -> State:
    # A buffer of zeros is as good as none: 0·m + g is the first gradient.
    return {name: torch.zeros_like(parameter) for name in _sgd_names(group)}


def _adam(
    parameter: Tensor,
    grad: Tensor,
    state: State,
    rate: Tensor,
    is_new: bool,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
) -> None:
    count = state["step"].to(rate.dtype) + 1  # in the rate's float64: 1 - 0.999 has few digits in float32
    size, root = rate / (1 - betas[0] ** count), (1 - betas[1] ** count).sqrt()
    weight, grad, decay, size, root = _wide(parameter, grad, 1 - rate * weight_decay, size, root)
    grad = -grad if maximize else grad
    if weight_decay != 0 and decoupled_weight_decay:
        weight = weight * decay
    elif weight_decay != 0:
        grad = grad - (-weight_decay) * weight
    mean, square = state["exp_avg"].to(grad), state["exp_avg_sq"].to(grad)
    mean = mean + (1 - betas[0]) * (grad - mean)
    square = betas[1] * square + (1 - betas[1]) * grad * grad
    state["step"].copy_(count)
    state["exp_avg"].copy_(mean)
    state["exp_avg_sq"].copy_(square)
    if amsgrad:
        square = torch.maximum(state["max_exp_avg_sq"].to(grad), square)
        state["max_exp_avg_sq"].copy_(square)
    parameter.copy_(weight - size * (mean / (square.sqrt() / root + eps)))


def _adam_names(group: Mapping[str, Any]) -> tuple[str, ...]:
    return ("step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []))


def _adam_prepared(parameter: Tensor, group: Mapping[str, Any]) -> State:
    on_device = group["capturable"] or group["fused"]
    wide = torch.get_default_dtype() == torch.float64 and not group["fused"]
    dtype, device = torch.float64 if wide else torch.float32, parameter.device if on_device else "cpu"
    averages = {name: torch.zeros_like(parameter) for name in _adam_names(group)}
    return {**averages, "step": torch.zeros((), dtype=dtype, device=device)}


def _wide(parameter: Tensor, grad: Tensor, *scalars: Tensor) -> tuple[Tensor, ...]:
    """All of them in the dtype to compute in: 16-bit parameters are updated in float32."""
    wide = accumulation_dtype(parameter.dtype)
    return parameter.to(wide), grad.to(wide), *(scalar.to(wide) for scalar in scalars)


_ADAM = Update(
    _adam,
    _adam_names,
    _adam_prepared,
    ("betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"),
)
_UPDATES: dict[type, Update] = {
    torch.optim.SGD: Update(
        _sgd, _sgd_names, _sgd_prepared, ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
    ),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
}
"""By class and not by subclass, whose step may be another."""


_moving: "WeakKeyDictionary[torch.optim.Optimizer, set[Tensor]]" = WeakKeyDictionary()


@contextmanager
def moving(optimizer: torch.optim.Optimizer, parameters: set[Tensor]) -> Iterator[None]:
    """While the hooks behind a compiled step run: say which parameters it moved, as it leaves no gradients to tell."""
    _moving[optimizer] = parameters
    try:
        yield
    finally:
        del _moving[optimizer]


def has_moved(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """For a hook behind an optimizer's step: whether that step was one for this parameter."""
    return parameter.grad is not None if optimizer not in _moving else parameter in _moving[optimizer]


def update_of(optimizer: torch.optim.Optimizer) -> Update:
    """The formula of an optimizer.

    Raises:
        FxregError: an optimizer of another class, or one whose `step` was replaced.
    """
    kind = type(optimizer)
    if kind not in _UPDATES:
        known = ", ".join(f"torch.optim.{known.__name__}" for known in _UPDATES)
        raise FxregError(
            f"train_step: the optimizer is a {kind.__module__}.{kind.__qualname__}, and the step has the formulas of "
            f"{known}. Use one of them, or the ordinary loop."
        )
    step = vars(optimizer).get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        raise FxregError(
            f"train_step: the step of this {kind.__name__} was replaced by {step!r}, which a compiled step would not "
            "call. Use the ordinary loop."
        )
    return _UPDATES[kind]
