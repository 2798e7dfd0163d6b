"""The numerics around a formula: strengths, dtypes, autocast, the loss scale."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active  # private: no public way to ask
from torch._guards import TracingContext  # private: what is being compiled

from . import operators
from .errors import RuleError
from .norms import whole

F = TypeVar("F", bound=Callable[..., Any])


def gives_new(function: F) -> F:
    """Say of a closed form that it returns a tensor of its own, into which may be written."""
    function.gives_new = True  # type: ignore[attr-defined]
    return function


def misfit(effect: str, met: Tensor, error: Exception) -> RuleError:
    """What to raise where a formula meets a tensor whose shape nobody could know before."""
    return RuleError(
        f"{effect} does not fit a tensor of shape {tuple(met.shape)}: {error}. Mend its arguments, or narrow the rule."
    )


@dataclass(frozen=True)
class PenaltyFormula:
    """R(w), its gradient in closed form where there is one, and how strengths enter.

    Attributes:
        function: R, or the penalty itself where the formula has strengths of its own.
        closed_form: dR/dw.
        implicit: whether one strength multiplies R from outside.
        anchors: the arguments that are a tensor for each parameter.
    """

    function: Callable[..., Tensor]
    closed_form: Callable[..., Tensor] | None
    implicit: bool
    anchors: tuple[str, ...] = ()

    def value(self, weight: Tensor, strengths: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> Tensor:
        """s·R(w) as a 0-d tensor: autocast off, 16-bit weights in float32."""
        wide = operators.cast(weight, operators.accumulation_dtype(weight.dtype))
        factor, found = self._parts(self.function, wide, None, strengths, arguments)
        return operators.cast(found if factor is None else factor * _kept(found), wide.dtype)

    def gradient(
        self, seed: Tensor, weight: Tensor, strengths: Mapping[str, Tensor], arguments: Mapping[str, Any]
    ) -> Tensor:
        """seed · s · dR/dw from the closed form."""
        factor, found = self._parts(self.closed_form, weight, seed, strengths, arguments)
        assert factor is not None
        if type(weight) is Tensor and self._is_owned(found):
            return found.mul_(factor)
        found = operators.cast(factor * found, weight.dtype)
        if type(weight) is Tensor:
            return found
        placements = getattr(weight, "placements", None)
        if placements is not None and placements != getattr(found, "placements", None):
            sharded: Any = found  # another way than the weight, whose gradient is expected its way
            found = sharded.redistribute(placements=placements)
        return found

    def _is_owned(self, found: Tensor) -> bool:
        """Whether what the closed form gave may be written into, which in eager mode saves a new tensor a site."""
        owned = getattr(self.closed_form, "gives_new", False) and type(found) is Tensor and not torch.is_grad_enabled()
        return owned and not _are_functorch_transforms_active()

    def added(
        self,
        grad: Tensor,
        seed: Tensor,
        weight: Tensor,
        strengths: Mapping[str, Tensor],
        arguments: Mapping[str, Any],
    ) -> Tensor:
        """grad + seed · s · dR/dw."""
        if type(grad) is type(weight) is Tensor:  # nothing is traced: in one pass, without a tensor for the product
            factor, found = self._parts(self.closed_form, weight, seed, strengths, arguments)
            assert factor is not None
            return torch.addcmul(grad, found, factor.to(grad), out=found if self._is_owned(found) else None)
        # Subtracting the negative: Inductor turns `mm + r` into addmm, which writes r and reads it back.
        return grad - self.gradient(-seed, weight, strengths, arguments)

    def _parts(
        self,
        function: Callable[..., Tensor] | None,
        weight: Tensor,
        seed: Tensor | None,
        strengths: Mapping[str, Tensor],
        arguments: Mapping[str, Any],
    ) -> tuple[Tensor | None, Tensor]:
        """What the formula gives, and the product of seed and strength in front of it, if there is one.

        Strengths stay in float64 and only the product is cast: float32(1e-4) is off by 2.5e-8.
        """
        assert function is not None
        device = weight.device
        live = {name: operators.scalar_on(device, strength) for name, strength in strengths.items()}
        factor = live.pop("strength") if self.implicit else None
        if seed is not None:
            factor = seed if factor is None else _kept(seed * factor)
        with operators.without_autocast(device):
            return factor, function(weight, **live, **_beside(weight, arguments, self.anchors))


@dataclass(frozen=True)
class GradientFormula:
    """f(grad, weight), and how the loss scale and the tensors around it enter."""

    function: Callable[..., Tensor]
    anchors: tuple[str, ...] = ()

    def transform(
        self,
        grad: Tensor,
        weight: Tensor,
        scale: Tensor,
        live: Mapping[str, Tensor],
        arguments: Mapping[str, Any],
    ) -> Tensor:
        """scale · f(grad / scale); with scale ≠ 1 a gradient that is not finite passes unchanged."""
        factor = operators.scalar(scale).to(grad)
        cast = _beside(weight, arguments, self.anchors)
        for name, tensor in live.items():
            cast[name] = operators.scalar(tensor).to(grad) if tensor.is_floating_point() else tensor.to(grad.device)
        with operators.without_autocast(grad.device):
            result = self.function(grad / factor, weight, **cast) * factor
            if result.shape != grad.shape:
                raise RuleError(f"the new gradient has shape {tuple(result.shape)}, the old one {tuple(grad.shape)}")
            return torch.where((factor == 1) | grad.isfinite().all(), result, grad)


@dataclass(frozen=True)
class JointFormula:
    """f(grads, weights) of several parameters."""

    function: Callable[..., list[Tensor]]

    def transform(
        self,
        grads: list[Tensor],
        weights: list[Tensor],
        scale: Tensor,
        live: Mapping[str, Tensor],
        arguments: Mapping[str, Any],
    ) -> list[Tensor]:
        """scale · f(grads / scale); with scale ≠ 1 gradients pass unchanged if one of them is not finite."""
        device, wide = grads[0].device, functools.reduce(torch.promote_types, (grad.dtype for grad in grads))
        named = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in arguments.items()}
        named |= {name: operators.scalar(tensor).to(device, wide) for name, tensor in live.items()}
        factors = [operators.scalar(scale).to(grad) for grad in grads]
        with contextlib.ExitStack() as stack:
            for one in {grad.device for grad in grads}:
                stack.enter_context(operators.without_autocast(one))
            unscaled = [grad / factor for grad, factor in zip(grads, factors, strict=True)]
            found = list(self.function(unscaled, weights, **named))
            shapes, expected = ([tuple(one.shape) for one in several] for several in (found, grads))
            if shapes != expected:
                raise RuleError(f"the new gradients have shapes {shapes}, the old ones {expected}")
            acts = (factors[0] == 1) | torch.stack([whole(grad.isfinite().all()).to(device) for grad in grads]).all()
            return [
                torch.where(acts.to(old.device), new * factor, old)
                for old, new, factor in zip(grads, found, factors, strict=True)
            ]


@dataclass(frozen=True)
class ProximalFormula:
    """argmin_u ½‖u − w‖² + lr·s·R(u), or a projection; and how the learning rate and the strengths enter.

    Attributes:
        function: of the weight, then of the step if there is one, then of strengths and arguments by name.
        implicit: whether the step is lr·s, as the strength multiplies R from outside, or lr alone, as the formula has
            strengths of its own. None for a projection, which has no step.
        foreach: whether the function takes and returns several weights at once.
        anchors: the arguments that are a tensor for each parameter; with them, weights come one by one.
    """

    function: Callable[..., Any]
    implicit: bool | None
    foreach: bool = False
    anchors: tuple[str, ...] = ()

    def moved(
        self,
        weights: Sequence[Tensor],
        lr: float | Tensor,
        strengths: Mapping[str, Tensor],
        arguments: Mapping[str, Any],
    ) -> list[Tensor]:
        """The new weights, of those of one device and dtype: autocast off, 16-bit ones in float32."""
        device = weights[0].device
        wide = [weight.to(operators.accumulation_dtype(weight.dtype)) for weight in weights]
        live = {name: operators.scalar(strength).to(device) for name, strength in strengths.items()}
        named = _beside(wide[0], arguments, self.anchors)
        steps: list[Tensor] = []
        if self.implicit is not None:
            # A product with a tensor of the device: a number, or a tensor elsewhere, would have to be moved there.
            rate = lr.reshape(()) if isinstance(lr, Tensor) else lr
            steps = [rate * (live.pop("strength") if self.implicit else torch.ones_like(next(iter(live.values()))))]
        with operators.without_autocast(device):
            if self.foreach:
                found = list(self.function(wide, *steps, **live, **named))
            else:
                found = [self.function(weight, *steps, **live, **named) for weight in wide]
        for old, new in zip(weights, found, strict=True):
            if new.shape != old.shape:
                raise RuleError(f"the new weight has shape {tuple(new.shape)}, the old one {tuple(old.shape)}")
        return found


def _kept(scalar: Tensor) -> Tensor:
    """The same number, which Inductor then keeps in memory, as what a strided view is taken of; its gradient, too.

    It fuses kernels that read two such numbers, as these are 16 bytes in common: the gradients of all weights'
    penalties would be made at once, at the start of the backward pass, and wait in memory for those of the loss.
    """
    if TracingContext.try_get() is None or hasattr(scalar, "device_mesh"):  # nothing is compiled; sharded
        return scalar
    return scalar.as_strided((), ())


def _beside(weight: Tensor, arguments: Mapping[str, Any], anchors: tuple[str, ...]) -> dict[str, Any]:
    """Arguments as a formula takes them: tensors on the weight's device, and its own ones also of its kind."""
    found = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found[name] = _alike(weight, value) if name in anchors else value.to(weight.device)
    return found


def _alike(weight: Tensor, own: Tensor) -> Tensor:
    """A tensor of a parameter's own in its dtype, and sharded or whole as the parameter is just now."""
    if hasattr(weight, "device_mesh") or hasattr(own, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor  # takes a second to import

        if isinstance(weight, DTensor) and not isinstance(own, DTensor):
            # Every rank has all of it: none needs to hear from another.
            own = distribute_tensor(own.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
        elif isinstance(own, DTensor) and not isinstance(weight, DTensor):
            own = own.full_tensor()
    return own.to(weight.device, weight.dtype)


def as_given(arguments: dict[str, Any]) -> dict[str, Any]:
    """An operator's arguments as its formula takes them: the dispatcher turns tuples into lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
