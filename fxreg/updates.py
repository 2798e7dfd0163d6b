"""How optimizers change a parameter: torch's SGD, Adam and AdamW as formulas that a compiled step can hold.

`torch.optim.sgd.sgd` and its like add with `grad.add(w, alpha=d)`. In one graph with the matrix product that made the
gradient, Inductor (torch 2.13) fuses that into `addmm` and drops the d, silently. So the formulas stand here, without
an `alpha`; the tests compare them with torch's optimizers, option by option.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
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
        formula: (parameter, gradient, state, numbers, switches) → nothing; changes the parameter and its state in
            place. `numbers` are 0-d float64 tensors by name, `switches` constants of the graph.
        numbers: a group → what of it can change from step to step without a new graph.
        switches: a group → what decides which formula it is.
        names: a group → the names in the state of each of its parameters.
        prepared: (parameter, its group) → the state that the optimizer gives a parameter at first.
    """

    formula: Callable[[Tensor, Tensor, State, dict[str, Tensor], dict[str, bool]], None]
    numbers: Callable[[Mapping[str, Any]], dict[str, float | Tensor]]
    switches: Callable[[Mapping[str, Any]], dict[str, bool]]
    names: Callable[[Mapping[str, Any]], tuple[str, ...]]
    prepared: Callable[[Tensor, Mapping[str, Any]], State]


def _sgd(parameter: Tensor, grad: Tensor, state: State, numbers: dict[str, Tensor], switches: dict[str, bool]) -> None:
    weight, grad, given = _wide(parameter, grad, numbers)
    grad = -grad if switches["maximize"] else grad
    if switches["weight_decay"]:
        grad = grad - (-given["weight_decay"]) * weight
    if switches["momentum"]:
        buffer, momentum = state["momentum_buffer"], given["momentum"]
        is_first = switches["dampening"] and switches["new"]
        velocity = grad if is_first else momentum * buffer.to(grad) - (given["dampening"] - 1) * grad
        buffer.copy_(velocity)
        grad = grad - (-momentum) * velocity if switches["nesterov"] else velocity
    parameter.copy_(weight - given["lr"] * grad)


def _sgd_numbers(group: Mapping[str, Any]) -> dict[str, float | Tensor]:
    return {name: group[name] for name in ("lr", "momentum", "dampening", "weight_decay")}


def _sgd_switches(group: Mapping[str, Any]) -> dict[str, bool]:
    on = {name: _is_on(group[name]) for name in ("momentum", "dampening", "weight_decay")}
    return {**on, "nesterov": group["nesterov"], "maximize": group["maximize"]}


def _sgd_names(group: Mapping[str, Any]) -> tuple[str, ...]:
    return ("momentum_buffer",) if _is_on(group["momentum"]) else ()


def _sgd_prepared(parameter: Tensor, group: Mapping[str, Any]) -> State:
    # A buffer of zeros is as good as none: m·0 + g is the first gradient.
    return {name: torch.zeros_like(parameter) for name in _sgd_names(group)}


def _adam(parameter: Tensor, grad: Tensor, state: State, numbers: dict[str, Tensor], switches: dict[str, bool]) -> None:
    # Corrections in float64: of 1 - 0.999, float32 has few digits.
    count, beta1, beta2 = state["step"].to(numbers["lr"]) + 1, numbers["beta1"], numbers["beta2"]
    weight, grad, given = _wide(
        parameter,
        grad,
        {
            **numbers,
            "size": numbers["lr"] / (1 - beta1**count),
            "root": (1 - beta2**count).sqrt(),
            "rest1": 1 - beta1,
            "rest2": 1 - beta2,
            "kept": 1 - numbers["lr"] * numbers["weight_decay"],
        },
    )
    grad = -grad if switches["maximize"] else grad
    if switches["weight_decay"] and switches["decoupled_weight_decay"]:
        weight = weight * given["kept"]
    elif switches["weight_decay"]:
        grad = grad - (-given["weight_decay"]) * weight
    mean, square = state["exp_avg"].to(grad), state["exp_avg_sq"].to(grad)
    mean = mean + given["rest1"] * (grad - mean)
    square = given["beta2"] * square + given["rest2"] * grad * grad
    state["step"].copy_(count)
    state["exp_avg"].copy_(mean)
    state["exp_avg_sq"].copy_(square)
    if switches["amsgrad"]:
        square = torch.maximum(state["max_exp_avg_sq"].to(grad), square)
        state["max_exp_avg_sq"].copy_(square)
    parameter.copy_(weight - given["size"] * (mean / (square.sqrt() / given["root"] + given["eps"])))


def _adam_numbers(group: Mapping[str, Any]) -> dict[str, float | Tensor]:
    beta1, beta2 = group["betas"]
    return {
        "lr": group["lr"],
        "beta1": beta1,
        "beta2": beta2,
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
    }


def _adam_switches(group: Mapping[str, Any]) -> dict[str, bool]:
    given = {name: group[name] for name in ("amsgrad", "maximize", "decoupled_weight_decay")}
    return {**given, "weight_decay": _is_on(group["weight_decay"])}


def _adam_names(group: Mapping[str, Any]) -> tuple[str, ...]:
    return ("step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []))


def _adam_prepared(parameter: Tensor, group: Mapping[str, Any]) -> State:
    on_device = group["capturable"] or group["fused"]
    wide = torch.get_default_dtype() == torch.float64 and not group["fused"]
    dtype, device = torch.float64 if wide else torch.float32, parameter.device if on_device else "cpu"
    averages = {name: torch.zeros_like(parameter) for name in _adam_names(group)}
    return {**averages, "step": torch.zeros((), dtype=dtype, device=device)}


def _is_on(number: float | Tensor) -> bool:
    """Whether the formula needs a number; a tensor is not looked at, which could wait for its device."""
    return isinstance(number, Tensor) or number != 0


def _wide(parameter: Tensor, grad: Tensor, numbers: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """All of them in the dtype to compute in: 16-bit parameters are updated in float32."""
    wide = accumulation_dtype(parameter.dtype)
    return parameter.to(wide), grad.to(wide), {name: number.to(wide) for name, number in numbers.items()}


_ADAM = Update(_adam, _adam_numbers, _adam_switches, _adam_names, _adam_prepared)
_UPDATES: dict[type, Update] = {
    torch.optim.SGD: Update(_sgd, _sgd_numbers, _sgd_switches, _sgd_names, _sgd_prepared),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
}
"""By class, and not for a subclass, whose step may be another."""


_moving: "WeakKeyDictionary[torch.optim.Optimizer, tuple[set[Tensor], Collection[object]]]" = WeakKeyDictionary()


@contextmanager
def moving(optimizer: torch.optim.Optimizer, parameters: set[Tensor], done: Collection[object] = ()) -> Iterator[None]:
    """While the hooks behind a compiled step run: say which parameters it moved, as it leaves no gradients to tell, and
    which of the hooks' owners it has done the work of."""
    _moving[optimizer] = parameters, done
    try:
        yield
    finally:
        del _moving[optimizer]


def has_moved(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """For a hook behind an optimizer's step: whether that step was one for this parameter."""
    return parameter.grad is not None if optimizer not in _moving else parameter in _moving[optimizer][0]


def is_done(optimizer: torch.optim.Optimizer, owner: object) -> bool:
    """For a hook behind an optimizer's step: whether a compiled step has its owner's work in it."""
    return optimizer in _moving and owner in _moving[optimizer][1]


def update_of(optimizer: torch.optim.Optimizer) -> Update:
    """The formula of an optimizer.

    Raises:
        FxregError: an optimizer of another class, one to be differentiated, or one whose `step` was replaced.
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
    if any(group["differentiable"] for group in optimizer.param_groups):
        raise FxregError(
            f"train_step: this {kind.__name__} has differentiable=True, and a compiled step is not differentiated. "
            "Leave it out, or use the ordinary loop."
        )
    return _UPDATES[kind]
