"""What a joint gradient transform is: one that sees the gradients of all the parameters of its rule at once."""

from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec

from torch import Tensor

from . import operators
from .arguments import Argument
from .defining import define
from .effects import Definition, Effect
from .errors import RuleError
from .formulas import JointFormula, as_given

P = ParamSpec("P")


class Joint(Definition[P]):
    """An effect that maps the loss's gradients of several parameters to others."""

    default_via = "gradient"
    leading = 2
    is_joint = True

    def __init__(self, function: Callable[..., Any]) -> None:
        self.formula = JointFormula(function)
        super().__init__(function)

    def _read_parameters(self) -> Iterator[Argument]:
        for argument in super()._read_parameters():
            if argument.schema in ("stream", "anchor"):
                raise RuleError(
                    f"effect {self.name!r}: a joint transform has no tensor for each parameter. Drop {argument.name!r}."
                )
            yield argument

    def _trial(self, weight: Tensor, effect: Effect) -> str | None:
        live = {name: weight.new_ones(()) for name in self.live_names}
        arguments = self._trial_arguments(weight, effect)
        self.formula.transform([weight], [weight], weight.new_ones(()), live, arguments)
        return None

    def _define_operators(self) -> None:
        formula, names = self.formula, self.live_names

        def pull(
            grads: list[Tensor], weights: list[Tensor], tensors: tuple[Tensor, ...], arguments: dict[str, Any]
        ) -> list[Tensor]:
            scale, *live = tensors
            return formula.transform(grads, weights, scale, dict(zip(names, live, strict=True)), arguments)

        self.operator = define(
            self.name,
            self.fingerprint,
            f"{self.schema('Tensor[] weight', 'Tensor scale')}[]",
            lambda weights, *tensors, **arguments: operators.jointly_pulled(
                pull, as_given(arguments), weights, *tensors
            ),
        )


def joint_gradient(function: Callable[Concatenate[list[Tensor], list[Tensor], P], list[Tensor]]) -> Joint[P]:
    """Register a gradient transform over all the parameters of a rule, from its formula
    f(grads, weights, *, named parameters) -> list of Tensors.

    It is called once in a backward pass of a forward call, with the gradients of those parameters that have one then,
    in the order of `named_parameters()`. It stands in rule order with the transforms of single parameters.

    Args:
        function: the formula: `grads[i]` and `weights[i]` have one parameter's shape, in float32 or wider, and may be
            on different devices. Named parameters are those of `fxreg.gradient`, without `fxreg.Stream` and
            `fxreg.Anchor`; a `fxreg.Strength` is on the first one's device, in the widest dtype.

    Raises:
        RuleError: a parameter that an operator's schema cannot hold.

    >>> import torch, fxreg
    >>> @fxreg.joint_gradient
    ... def mean_free(grads: list[torch.Tensor], weights: list[torch.Tensor]) -> list[torch.Tensor]:
    ...     mean = torch.stack([grad.mean() for grad in grads]).mean()
    ...     return [grad - mean for grad in grads]
    >>> mean_free()
    mean_free()
    """
    return Joint(function)
