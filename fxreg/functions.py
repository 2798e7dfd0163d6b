"""Penalties on a model's function: on how fast its outputs change with its inputs.

R(f) = Σ ‖∂⟨v, f(x)⟩/∂x‖², over the floating-point tensors among the inputs x, and summed over those in the output. A
formula here says what v is, for one of them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Concatenate, ParamSpec, cast

import torch
from torch import Tensor

from .arguments import Argument, Stream
from .effects import Definition
from .hashing import uniform

P = ParamSpec("P")


class FunctionPenalty(Definition[P]):
    """An effect that adds s·R(f) to the objective."""

    default_via = "penalty"
    leading = 1

    def _read_parameters(self) -> Iterator[Argument]:
        yield Argument("strength", "strength")
        yield from super()._read_parameters()


def _function_penalty(function: Callable[Concatenate[Tensor, P], Tensor]) -> FunctionPenalty[Concatenate[float, P]]:
    return cast(FunctionPenalty[Concatenate[float, P]], FunctionPenalty(function))


@_function_penalty
def input_gradient(output: Tensor) -> Tensor:
    """Square of the input's gradient, R(f) = ‖∂L/∂x‖², of the loss that the model returns, or of its outputs' sum.

    Samples of a batch that do not mix have their gradients by themselves. `reduction="batch"` is the mean over them,
    for a sum of losses; the gradient of a mean of n losses is smaller by 1/n, and its square by 1/n².

    Gradient: by automatic differentiation, through the gradient of the model.

    Args:
        strength: s ≥ 0, in units of loss per unit of gradient squared.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; a rule that is not on the model's input.

    >>> import torch, fxreg
    >>> model = torch.nn.Linear(3, 1, bias=False)
    >>> gm = fxreg.transform(model, fxreg.Rule(fxreg.input_gradient(1.0), on="input", reduction="batch"))
    >>> value = fxreg.penalties(gm, torch.randn(8, 3))["input_gradient"]
    >>> torch.allclose(value, model.weight.square().sum())
    True

    Source: Drucker and LeCun (1992), "Improving generalization performance using double backpropagation".
    """
    return torch.ones_like(output)


@_function_penalty
def jacobian(output: Tensor, *, stream: Stream, samples: int = 1, seed: int = 0) -> Tensor:
    """Square of the Jacobian's norm, R(f) = ‖∂f/∂x‖²_F, as Hutchinson estimates it: the mean of ‖vᵀ·∂f/∂x‖².

    The elements of v are −1 or 1 at random, a pure function of the seed, the step and the element's index: torch's own
    generators are neither read nor advanced. The estimate is unbiased.

    Gradient: by automatic differentiation, through the gradient of the model.

    Args:
        strength: s ≥ 0, in units of loss per unit of output over input, squared.
        samples: how many v there are. Each is a pass through the model, forward and backward.
        seed: chooses them.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; a rule that is not on the model's input.

    >>> import torch, fxreg
    >>> model = torch.nn.Linear(3, 1, bias=False)
    >>> gm = fxreg.transform(model, fxreg.Rule(fxreg.jacobian(1.0), on="input", reduction="batch"))
    >>> value = fxreg.penalties(gm, torch.randn(8, 3))["jacobian"]
    >>> torch.allclose(value, model.weight.square().sum())
    True

    Source: Hutchinson (1990), "A stochastic estimator of the trace"; Hoffman, Roberts and Yaida (2019), "Robust
    learning with Jacobian regularization", eq. 10.
    """
    index = torch.arange(output.numel(), device=output.device).reshape(output.shape)
    key, step = stream.to(output.device).unbind()
    return torch.where(uniform(key, step, index) < 0.5, -1, 1).to(output.dtype)


def directions(
    definition: Definition[Any], outputs: Sequence[Tensor], stream: Tensor | None, arguments: Any, sample: int
) -> list[Tensor]:
    """v for each of the outputs."""
    found = []
    for place, output in enumerate(outputs):
        named = dict(arguments)
        if stream is not None:
            salt = torch.tensor([sample * len(outputs) + place, 0], device=stream.device)
            named["stream"] = stream + salt
        found.append(definition.function(output, **named))
    return found
