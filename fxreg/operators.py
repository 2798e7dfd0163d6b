"""What the operators of emitted graphs do: autograd functions that add, transform and attach gradients, and how numbers
are kept while they do."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active  # private: no public way to ask
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch._guards import TracingContext  # private: what is being compiled
from torch._subclasses.functional_tensor import FunctionalTensor  # private: what AOTAutograd traces with
from torch.autograd.function import _SingleLevelFunction

from .defining import define
from .errors import FxregError
from .fingerprints import Fingerprint

Formula = Callable[[Tensor, Tensor, tuple[Tensor, ...], dict[str, Any]], Tensor]
"""What a backward pass computes: (incoming gradient, weight, live tensors, arguments) to the outgoing gradient."""

JointFormula = Callable[[list[Tensor], list[Tensor], tuple[Tensor, ...], dict[str, Any]], list[Tensor]]
"""The same of several parameters at once."""


def _apply(function: Any, *args: Any) -> Any:
    # A composite kernel already runs inside one functorch level: a `torch.autograd.Function`, which dispatches through
    # functorch by itself, would be applied at the wrong one. Outside, that is a quarter of what a site costs in eager
    # mode: it binds arguments to a signature.
    if _are_functorch_transforms_active():
        with enable_single_level_autograd_function():
            return function.apply(*args)
    return function.apply(*unwrap_dead_wrappers(args))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a tensor of `dtype` is penalized: 16-bit ones accumulate in float32."""
    return torch.float32 if dtype.itemsize < 4 else dtype


# Eager mode pays for each call at every site, also for one that gives back what it was given: asked first, it costs a
# tenth.
def scalar(tensor: Tensor) -> Tensor:
    """A tensor of one element as a 0-d one."""
    return tensor if tensor.ndim == 0 else tensor.reshape(())


def scalar_on(device: torch.device, tensor: Tensor) -> Tensor:
    """The same on a device."""
    tensor = scalar(tensor)
    return tensor if tensor.device == device else tensor.to(device)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers in `dtype`."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


_NOTHING = nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which autocast is off for a device."""
    if _has_autocast(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


class _Source(_SingleLevelFunction):
    """Where the penalties' gradients start: nothing forward; backward, `scale` to every penalty, once."""

    @staticmethod
    def forward(scale: Tensor, *penalties: Tensor) -> Tensor:
        return torch.zeros_like(scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        scale, *penalties = inputs
        ctx.save_for_backward(scale)
        ctx.kinds = [(penalty.device, penalty.dtype) for penalty in penalties]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        seeds = {(device, dtype): scale.to(device=device, dtype=dtype) for device, dtype in set(ctx.kinds)}
        return (None, *(seeds[kind] for kind in ctx.kinds))

    @staticmethod
    def jvp(ctx: Any, scale: None, *tangents: Tensor | None) -> Tensor | None:
        return None


class _Attach(_SingleLevelFunction):
    """Identity on one output; the backward pass through it also reaches the source. A node for each: one for all would
    give zeros, and not nothing, to what only the outputs without a gradient depend on."""

    @staticmethod
    def forward(shared: bool, output: Tensor, source: Tensor) -> Tensor:
        # detach, not view_as: a caller may write into what it got. Not so where two outputs share memory, or one with
        # what was given: autograd would not see the write in the other one, and raises for view_as. Sparse tensors have
        # no views.
        return output.view_as(output) if shared and output.layout is torch.strided else output.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        (source,) = ctx.saved_tensors
        return None, grad, torch.zeros_like(source)

    @staticmethod
    def jvp(ctx: Any, shared: None, output: Tensor | None, source: Tensor | None) -> Tensor | None:
        return output if output is None else output.view_as(output)


class _Deferred(_SingleLevelFunction):
    """A penalty whose value nobody asked for: costs nothing forward, adds its closed-form gradient backward; or leaves
    that to a hook on the weight, which finds in `left` what it needs."""

    @staticmethod
    def forward(
        gradient: Formula, arguments: dict[str, Any], left: list[Any] | None, weight: Tensor, *tensors: Tensor
    ) -> Tensor:
        return weight.new_zeros((), dtype=accumulation_dtype(weight.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.formula, ctx.arguments, ctx.left, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, seed: Tensor) -> tuple[Tensor | None, ...]:
        weight, *tensors = ctx.saved_tensors
        if ctx.left is None:
            gradient = _narrow(ctx.formula, ctx.arguments, seed, weight, tensors)
        else:
            ctx.left.append((seed, weight, tensors))
            gradient = torch.zeros_like(weight)  # so that the hook runs, whether or not the loss depends on the weight
        return (None, None, None, gradient, *(None for _ in tensors))

    @staticmethod
    def jvp(
        ctx: Any, gradient: None, arguments: None, left: None, weight: Tensor | None, *tensors: Tensor | None
    ) -> None:
        return None


def _narrow(
    gradient: Formula, arguments: dict[str, Any], seed: Tensor, weight: Tensor, tensors: Sequence[Tensor]
) -> Tensor:
    """A penalty's gradient in the weight's dtype, computed at least in float32."""
    wide = cast(weight.detach(), accumulation_dtype(weight.dtype))
    return cast(gradient(seed, wide, tuple(tensors), arguments), weight.dtype)


class _Pulled(_SingleLevelFunction):
    """Identity on a parameter; its gradient passes through `pull` on the way back, computed at least in float32."""

    @staticmethod
    def forward(pull: Formula, arguments: dict[str, Any], weight: Tensor, *tensors: Tensor) -> Tensor:
        return weight.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.formula, ctx.arguments, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, *tensors = ctx.saved_tensors
        if grad is not None:
            grad = grad.to_dense() if grad.is_sparse else grad
            wide = accumulation_dtype(weight.dtype)
            pulled = ctx.formula(cast(grad, wide), cast(weight.detach(), wide), tuple(tensors), ctx.arguments)
            grad = cast(pulled, weight.dtype)
        return (None, None, grad, *(None for _ in tensors))

    @staticmethod
    def jvp(ctx: Any, pull: None, arguments: None, weight: Tensor | None, *tensors: Tensor | None) -> Tensor | None:
        return weight if weight is None else weight.view_as(weight)


class _JointlyPulled(_SingleLevelFunction):
    """Identity on several parameters; their gradients, those that there are, pass through `pull` together."""

    @staticmethod
    def forward(pull: JointFormula, arguments: dict[str, Any], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(weight.detach() for weight in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.formula, ctx.arguments, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        weights, tensors = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        reached = {k: grad.to_dense() if grad.is_sparse else grad for k, grad in enumerate(grads) if grad is not None}
        result: list[Tensor | None] = [None] * ctx.count
        if reached:
            wide = {k: accumulation_dtype(weights[k].dtype) for k in reached}
            before = [grad.to(wide[k]) for k, grad in reached.items()]
            after = ctx.formula(before, [weights[k].detach().to(wide[k]) for k in reached], tensors, ctx.arguments)
            for k, grad in zip(reached, after, strict=True):
                result[k] = grad.to(weights[k].dtype)
        return (None, None, None, *result, *(None for _ in tensors))

    @staticmethod
    def jvp(ctx: Any, pull: None, arguments: None, count: None, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if one is None else one.view_as(one) for one in tensors[: ctx.count])


def deferred(gradient: Formula, arguments: dict[str, Any], weight: Tensor, *tensors: Tensor) -> Tensor:
    """A zero whose backward adds `gradient(seed, weight, tensors, arguments)` to the weight's gradient."""
    left: list[Any] | None = [] if _is_compiled_input(weight) else None
    result: Tensor = _apply(_Deferred, gradient, arguments, left, weight, *map(_now, tensors))
    if left is not None:

        def subtract(grad: Tensor) -> Tensor:
            # The negative: Inductor turns `mm + r` into addmm, which writes r and reads it back.
            for seed, *met in left:
                grad = grad - _narrow(gradient, arguments, -seed, *met)
            left.clear()
            return grad

        weight.register_hook(subtract)  # type: ignore[no-untyped-call]
    return result


def _is_compiled_input(weight: Tensor) -> bool:
    """Whether AOTAutograd traces, and a tensor comes from outside of what it traces: nobody else has hooks on it, and
    none of them outlives the trace."""
    if TracingContext.try_get() is None or type(weight) is not FunctionalTensor or _are_functorch_transforms_active():
        return False
    return (
        weight.grad_fn is None or weight.grad_fn.name() == "torch::autograd::Error"
    )  # what stands for its history there


def pulled(pull: Formula, arguments: dict[str, Any], weight: Tensor, *tensors: Tensor) -> Tensor:
    """The weight itself; its gradient will be `pull(gradient, weight, tensors, arguments)`."""
    result: Tensor = _apply(_Pulled, pull, arguments, weight, *map(_now, tensors))
    return result


def jointly_pulled(
    pull: JointFormula, arguments: dict[str, Any], weights: Sequence[Tensor], *tensors: Tensor
) -> list[Tensor]:
    """The weights themselves; of those that require a gradient, it will be what `pull` makes of all of them."""
    live = {k: weight for k, weight in enumerate(weights) if weight.requires_grad}
    result = [weight.view_as(weight) for weight in weights]  # else the frozen ones would require a gradient, too
    if live:
        found = _apply(_JointlyPulled, pull, arguments, len(live), *live.values(), *map(_now, tensors))
        for k, weight in zip(live, found, strict=True):
            result[k] = weight
    return result


def _now(tensor: Tensor) -> Tensor:
    """A copy: the caller may change a strength in place before it calls backward."""
    return tensor.detach().clone()


def advance(stream: Tensor) -> None:
    """Count one more forward call in a random stream `[key, step]`, outside any functorch transform."""
    if torch.is_grad_enabled():
        if _recomputes():
            raise FxregError(
                "a rule draws random numbers, and a checkpoint (use_reentrant=False) around the emitted module runs it "
                "again in the backward pass, which would draw others. Use use_reentrant=True, or leave it out there."
            )
        while is_functorch_wrapped_tensor(stream):
            stream = get_unwrapped(stream)
        with torch.no_grad(), temporarily_clear_interpreter_stack():
            stream.select(0, 1).add_(1)


def _recomputes() -> bool:
    """Whether a checkpoint without a graph of its own runs again what it ran before."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and "_recomputation_hook" in getattr(hooks[0], "__qualname__", "")


def _drawn(stream: Tensor) -> Tensor:
    """A random stream as it is to be used in this forward call."""
    advance(stream)
    return stream.clone()


def _attach(
    outputs: Sequence[Tensor], penalties: Sequence[Tensor], scale: Tensor, given: Sequence[Tensor]
) -> list[Tensor]:
    # A parameter, or a view of one: autograd raises for a write into it, which detached it would go through.
    is_eager = TracingContext.try_get() is None and not _are_functorch_transforms_active()
    aliased = [(is_eager and base.is_leaf) or _is_parameter(base) for base in map(_base, outputs)]
    if len(outputs) + len(given) > 1:  # what follows costs as much as a small layer
        places = [*map(_memory, outputs)]
        counts = Counter(place for one in (*places, *map(_memory, given)) for place in one)
        aliased = [one or any(counts[p] > 1 for p in place) for one, place in zip(aliased, places, strict=True)]
    source = _apply(_Source, _now(scale).reshape(()), *penalties)
    return [_apply(_Attach, shared, output, source) for shared, output in zip(aliased, outputs, strict=True)]


def _base(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def _memory(tensor: Tensor) -> list[Any]:
    """What two tensors have in common that share memory: whose view they are. AOTAutograd makes each input of a graph a
    tensor of its own; there, the memory of what that stands for."""
    found: list[Any] = [id(_base(tensor))]
    if (meant := _meant(tensor)) is not tensor and torch._C._has_storage(meant):
        found.append(("storage", meant.untyped_storage()._cdata))
    return found


def _is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter, or stands for one or for a view of one."""
    return isinstance(_base(_meant(tensor)), torch.nn.Parameter)


def _meant(tensor: Tensor) -> Tensor:
    """What a tensor stands for in what AOTAutograd traces; elsewhere itself."""
    return torch._from_functional_tensor(tensor.elem) if type(tensor) is FunctionalTensor else tensor


def _total(penalties: Sequence[Tensor]) -> Tensor:
    total = penalties[0]
    for penalty in penalties[1:]:
        total = total + penalty.to(total.device)
    return total


_ATTACH = "(Tensor[] outputs, Tensor[] penalties, Tensor scale, Tensor[] given) -> Tensor[]"
attach = define("attach", Fingerprint(), _ATTACH, _attach)
total = define("total", Fingerprint(), "(Tensor[] penalties) -> Tensor", _total, _total)
drawn = define("drawn", Fingerprint(), "(Tensor(a!) stream) -> Tensor", _drawn)
