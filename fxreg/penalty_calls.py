"""The Python functions that emitted graphs call for penalties on forward calls: on activations, and on the function."""

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import CheckpointFunction

from .calls import call_model, call_with, is_unfinished
from .errors import CaptureError, FxregError
from .functions import directions
from .hearing import Hearing
from .operators import accumulation_dtype, total
from .operators import drawn as _draw_operator
from .structure import loss_in, map_tensors, tensors

Watched: TypeAlias = tuple[Any, ...]
"""A module inside another by its path, `"output"` or `"input"`, and what `penalize` is to be told."""
Penalized: TypeAlias = tuple[Any, list[Tensor]]
"""What a module returned, and a penalty for each module inside it that was watched."""


def call_model_penalized(
    state: Any,
    watched: list[Watched],
    substitutes: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    more_args: tuple[Any, ...] = (),
    more_kwargs: dict[str, Any] | None = None,
) -> Penalized:
    """`call_model`, and what `call_penalized` gives beside."""
    call_args = (state, substitutes, args, kwargs, more_args, more_kwargs)
    return cast(Penalized, _penalized(state.model, watched, call_model, call_args))


def call_penalized(
    module: nn.Module,
    watched: list[Watched],
    substitutes: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Penalized:
    """Call a module as a whole; beside what it returns, the penalties on activations of modules inside, one for each
    that is watched."""
    return cast(Penalized, _penalized(module, watched, call_with, (module, substitutes, args, kwargs)))


# Dynamo would not see the hooks.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _penalized(module: nn.Module, watched: list[Watched], call: Callable[..., Any], args: tuple[Any, ...]) -> Penalized:
    zero = torch.zeros((), device=watched[0][3][0].device)
    if not torch.is_grad_enabled() and all(arguments.get("value") is False for _, _, _, _, arguments, _, _ in watched):
        return call(*args), [zero for _ in watched]
    terms: list[list[Tensor]] = [[] for _ in watched]
    wants_gradient = torch.is_grad_enabled()
    modules = [module.get_submodule(path) for path, *_ in watched]

    def note(called: nn.Module, on: str, values: Any) -> None:
        around = None if torch.is_grad_enabled() or not wants_gradient else _function_around()
        if around:
            hearing.miss(called, f"the module runs inside {around}", _OUTSIDE)
            return
        for inner, (_, its_on, *penalty), found in zip(modules, watched, terms, strict=True):
            if inner is called and its_on == on:
                found.append(penalize(copied(values), *penalty))  # what is inside may write into them later

    what = {inner: str(what) for inner, (*_, what) in zip(modules, watched, strict=True)}
    with Hearing(module, what, note) as hearing:
        result = call(*args)
    if is_unfinished(result):
        raise CaptureError(
            f"the forward of {type(module).__name__} returns a {type(result).__name__}, which runs after the call: the "
            f"{what[modules[0]]} cannot be penalized in it. Return what it yields in a list."
        )
    return result, [total(found) if found else zero for found in terms]


_OUTSIDE = (
    "Checkpoint the whole module that fxreg.transform returned, or put the rule on the output of the module that "
    "does it."
)


def _function_around() -> str | None:
    """The autograd Function in whose forward the activations of what is being called have no gradient."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and not (frame.f_globals is globals() and frame.f_code.co_name == _penalized.__name__):
        if (kind := _applied(frame)) is not None:
            return "a reentrant checkpoint" if kind is CheckpointFunction else f"the forward of {kind.__name__}"
        frame = frame.f_back
    return None


def _applied(frame: types.FrameType) -> type[Any] | None:
    """The autograd Function that a frame applies, if any."""
    apply: Any = Function.apply
    if not isinstance(apply, types.BuiltinMethodType):
        return frame.f_locals["cls"] if frame.f_code is apply.__func__.__code__ else None
    if frame.f_code.co_name != "forward":  # torch 2.14, where nothing else of it is Python
        return None
    kinds = [*Function.__subclasses__()]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return next((kind for kind in kinds if getattr(kind.forward, "__code__", None) is frame.f_code), None)


def copied(values: Any) -> Any:
    """The same with a copy of every tensor."""
    return map_tensors(torch.clone, values)


def penalize(
    values: Any, effect: str, strengths: list[Tensor], arguments: dict[str, Any], reduction: str, what: str
) -> Tensor:
    """A penalty on every floating-point tensor in some values.

    Args:
        effect: the name of the penalty's operator and its overload.
        what: the values, for people.
    """
    found = [tensor for tensor in tensors(values) if tensor.is_floating_point()]
    if not found:
        raise FxregError(f"{what}: there is no floating-point tensor to penalize. Narrow the rule, or mend on=.")
    name, overload = effect.split(".")
    operator = getattr(getattr(torch.ops.fxreg, name), overload)
    terms = [reduced(operator(one, *strengths, **arguments), one, reduction) for one in found]
    result: Tensor = total(terms)
    return result


def penalize_function(
    state: Any,
    which: int,
    inputs: list[Any],
    strengths: list[Tensor],
    stream: Tensor | None,
    arguments: dict[str, Any],
    value: bool,
) -> Tensor:
    """A penalty on how the output of the captured graph follows its inputs.

    The graph runs again, on copies of its buffers; so that the model's random numbers stay what they are without the
    penalty, torch's generators are put back, but for compiled code, which draws its own.

    Args:
        which: the number of the edit among the plan's.
        arguments: those of the effect.
        value: whether the value is wanted where no gradient is.
    """
    edit = state.provenance.plan.functions[which]
    places = [place for place, one in enumerate(inputs) if isinstance(one, Tensor) and one.is_floating_point()]
    if any(not isinstance(one, Tensor) and any(tensors(one)) for one in inputs):
        raise FxregError(f"rule {edit.label!r}: there are tensors inside an argument. Pass them as arguments.")
    if not places:
        raise FxregError(f"rule {edit.label!r}: there is no floating-point tensor among the inputs. Drop the rule.")
    if not value and not torch.is_grad_enabled():
        return torch.zeros((), device=inputs[places[0]].device)
    drawn = None if stream is None else _draw_operator(stream)
    parameters = dict(state.function.named_parameters())
    for site in state.provenance.plan.frozen:
        parameters[site] = parameters[site].detach()
    buffers = {name: buffer.clone() for name, buffer in state.model.named_buffers()}

    def along(sample: int, floating: list[Tensor], buffers: dict[str, Tensor]) -> Tensor:
        given = list(inputs)
        for place, one in zip(places, floating, strict=True):
            given[place] = one
        output = torch.func.functional_call(state.function, {**parameters, **buffers}, tuple(given))
        outputs = followed(output)
        found = directions(edit.effect.definition, outputs, drawn, arguments, sample)
        return sum_of([(v.detach() * one).sum() for v, one in zip(found, outputs, strict=True)])

    terms: list[Tensor] = []
    samples = arguments.get("samples", 1)
    with _generators_kept(inputs):
        for sample in range(samples):
            found = torch.func.grad(along, argnums=1)(sample, [inputs[place] for place in places], buffers)
            terms += [summed_squares(one) for one in found]
    strength = strengths[0].reshape(()).to(terms[0].device)
    penalty = (strength * sum_of(terms) / samples).to(terms[0].dtype)
    return reduced(penalty, inputs[places[0]], edit.reduction)


def followed(output: Any) -> list[Tensor]:
    """What a penalty on a function follows: the loss that a model returns, or all of its floating-point tensors."""
    loss = loss_in(output)
    found = [one for one in tensors(output if loss is None else loss) if one.is_floating_point()]
    if not found:
        raise FxregError("a penalty on the model's function: there is no floating-point tensor in its output.")
    return found


def summed_squares(gradient: Tensor) -> Tensor:
    """‖g‖², of one of 16 bits in float32."""
    return gradient.to(accumulation_dtype(gradient.dtype)).square().sum()


def sum_of(terms: list[Tensor]) -> Tensor:
    """Their sum, where the first one is."""
    result: Tensor = total(terms)
    return result


@contextmanager
def _generators_kept(inputs: list[Any]) -> Iterator[None]:
    if torch.compiler.is_compiling():
        yield
        return
    devices = {one.device for one in inputs if isinstance(one, Tensor) and one.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        yield


def reduced(penalty: Tensor, activation: Tensor, reduction: str) -> Tensor:
    """A penalty over the size of the batch, or over the number of elements."""
    if reduction == "sum":
        return penalty
    if reduction == "batch" and activation.dim() == 0:
        raise FxregError("reduction='batch': an activation is 0-d and has no batch. Use reduction='sum'.")
    count = activation.size(0) if reduction == "batch" else activation.numel()
    return penalty / max(count, 1)
