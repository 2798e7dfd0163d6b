"""The Python functions that emitted graphs call, beside the operators.

They hold what an operator's schema cannot: modules, and outputs of any structure. Each is a node that pickling and
re-tracing keep as a node (`is_wrapped`), and none of them has a backward of its own.
"""

import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active  # private: no public way to ask
from torch._C._functorch import (  # private: there is no other way to act below a level of `torch.vmap`
    TransformType,
    _add_batch_dim,
    _unwrap_batched,
    get_unwrapped,
    is_batchedtensor,
)
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.distributions import Distribution
from torch.utils import _pytree as pytree  # private by name only: what torch.export and torch.func document

from .enclosed import inside
from .errors import CaptureError, FxregError
from .operators import attach as _attach_operator
from .stand_ins import call_swapped, dressed, refuse_plain_stand_ins, without_reentrant_checkpoints
from .structure import PLAIN, follow, likeness, loss_in, map_tensors, replace_field, tensors


def call_model(
    state: Any,
    substitutes: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    more_args: tuple[Any, ...] = (),
    more_kwargs: dict[str, Any] | None = None,
) -> Any:
    """Call the whole original model: what a graph does when the root itself is opaque."""
    args, kwargs = (*args, *more_args), {**kwargs, **(more_kwargs or {})}
    return call_with(state.model, substitutes, args, kwargs) if substitutes else state.call_model(args, kwargs)


def call_with(module: nn.Module, substitutes: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module with some of its parameters replaced, ties included; without gradients, with its own: a stand-in
    would say that it has none."""
    if not substitutes or not torch.is_grad_enabled():
        return module(*args, **kwargs)
    versions = _versions(substitutes)
    call = call_swapped if _is_layer(module) and substitutes.keys() <= module._parameters.keys() else _call_any
    result = call(module, substitutes, args, kwargs)
    if is_unfinished(result) or (not torch.compiler.is_compiling() and _leads_to_module(result)):
        raise CaptureError(
            f"the forward of {type(module).__name__} returns a {type(result).__name__}, which runs after the call, or "
            "leads to a module that may: a rule transforms the gradient of a parameter, which would be used "
            "untransformed there. Return what it gives, in a list if it is several, or use via='penalty'."
        )
    if versions != _versions(substitutes):
        raise CaptureError(
            f"the forward of {type(module).__name__} changes a parameter in place, and a rule transforms that "
            "parameter's gradient: the change would be lost on a stand-in. Use via='penalty', or move the change "
            "behind the optimizer's step."
        )
    return result


def is_unfinished(result: Any) -> bool:
    """Whether what a forward returned has still to run."""
    return isinstance(result, Iterator | AsyncIterator | Coroutine)


def _leads_to_module(result: Any) -> bool:
    """Whether what a forward returned has a module in it: in an object, or in what a function closes over."""
    waiting, met = [result], set[int]()
    while waiting:
        one = waiting.pop()
        if isinstance(one, nn.Module):
            return True
        if not isinstance(one, (Tensor, *PLAIN)) and id(one) not in met:
            met.add(id(one))
            waiting += inside(one)
    return False


def _is_layer(module: nn.Module) -> bool:
    """Whether a call runs nothing but the code of one of torch's own layers."""
    if isinstance(module, nn.RNNBase) or not type(module).__module__.startswith("torch.nn.modules."):
        return False
    return not (module._modules or module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module))


def _call_any(module: nn.Module, substitutes: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if any(hasattr(inner, "set_reshard_after_forward") for inner in module.modules()):
        raise CaptureError(
            f"a {type(module).__name__} was sharded by itself (fully_shard), and a rule transforms the gradient of its "
            f"{next(iter(substitutes))!r}: it would use its own parameters, untransformed. Shard the emitted module as "
            "a whole, or use via='penalty'."
        )
    refuse_plain_stand_ins(module, substitutes)
    with _unflattened(module), dressed(module, substitutes) as alike, without_reentrant_checkpoints():
        return call_swapped(module, alike, args, kwargs)


@contextmanager
def _unflattened(module: nn.Module) -> Iterator[None]:
    """Recurrent layers also keep their weights in a list, and would keep stand-ins there; on a GPU they would moreover
    move all of them into new memory, where they already are as cuDNN wants them."""
    recurrent = [inner for inner in module.modules() if isinstance(inner, nn.RNNBase)]
    kept = [
        (inner._flat_weights, inner._flat_weight_refs, inner.__dict__.get("flatten_parameters")) for inner in recurrent
    ]
    try:
        for inner in recurrent:
            inner.__dict__["flatten_parameters"] = _nothing
        yield
    finally:
        for inner, (weights, references, own) in zip(recurrent, kept, strict=True):
            inner._flat_weights, inner._flat_weight_refs = weights, references
            if own is None:
                del inner.__dict__["flatten_parameters"]
            else:
                inner.__dict__["flatten_parameters"] = own


def _nothing() -> None:
    pass


def _versions(substitutes: dict[str, Tensor]) -> list[tuple[int, int]]:
    """How often each was written in place, and where it is; not to be seen while compiling or inside functorch."""
    if torch.compiler.is_compiling() or _are_functorch_transforms_active():
        return []
    return [(one._version, one.data_ptr() if type(one) is Tensor else 0) for one in substitutes.values()]


def take_inputs(state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The parts of an exported program's arguments; an error unless the program was exported for such."""
    return state.model.exported_inputs.leaves(args, kwargs)


def give_output(state: Any, parts: Any) -> Any:
    """What an exported program returns, made of its parts."""
    return pytree.tree_unflatten(list(parts), state.model.exported_output.spec)


def call_region(mode: str, args: tuple[Any, ...]) -> Any:
    """Run a region of an exported program in a grad or autocast mode of its own."""
    return getattr(torch.ops.higher_order, mode)(*args)


class _Apart(threading.local):
    """What a training step sets while it traces a module whose penalties it differentiates by themselves.

    Attributes:
        zero: a tensor of one element that stands for the penalties in the loss; its gradient is how often they count.
        met: how often penalties came by.
    """

    def __init__(self) -> None:  # once in each thread
        self.zero: Tensor | None = None
        self.met = 0

    def value(self, penalty: Tensor) -> Tensor:
        """The penalty as the loss is to see it."""
        if self.zero is None:
            return penalty
        self.met += 1
        return penalty.detach() + self.zero.reshape(()).to(penalty)


apart = _Apart()


def attach(output: Any, penalties: list[Tensor], scale: Tensor, given: Sequence[Any] = ()) -> Any:
    """The output, unchanged; the backward pass through any of its tensors also reaches the penalties, once.

    `given` is what the model was called with, as far as the output may be part of it.
    """
    if apart.zero is not None:
        apart.met += 1
        return output
    if not torch.is_grad_enabled() or not any(map(_is_followed, penalties)):
        return output
    live: list[Tensor] = []  # compared one by one: Dynamo either refuses an id or compiles anew for each
    for tensor in tensors(output):
        if _is_followed(tensor) and not any(tensor is one for one in live):
            live.append(tensor)
    if not live:
        raise FxregError(
            f"emit='backward': the model returned {type(output).__name__} without a differentiable tensor, so the "
            "penalties' gradient has no way back. Call it under torch.no_grad(), or use emit='output'."
        )
    inputs = [one for one in pytree.tree_leaves(given) if isinstance(one, Tensor)] if given else []
    attached = [_like(*each) for each in zip(_attached(live, penalties, scale, inputs), live, strict=True)]

    def replaced(tensor: Tensor) -> Tensor:
        for old, new in zip(live, attached, strict=True):
            if old is tensor:
                return new
        return tensor

    return map_tensors(replaced, output)


def _like(new: Tensor, old: Tensor) -> Tensor:
    """An output with what it had: a plain class, where something else was of another one; attributes, and that it keeps
    its gradient."""
    if type(old) is Tensor and type(new) is not Tensor:
        new = new.as_subclass(Tensor)
    if not torch.compiler.is_compiling():
        if own := getattr(old, "__dict__", None):
            vars(new).update(own)
        if old.retains_grad:
            new.retain_grad()
    return new


def _is_followed(tensor: Tensor) -> bool:
    """Whether autograd follows a tensor; of one that `torch.vmap` wraps, only what is inside knows."""
    if torch.compiler.is_compiling():
        return tensor.requires_grad or (_are_functorch_transforms_active() and is_batchedtensor(tensor))
    while is_batchedtensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor.requires_grad


def _attached(outputs: list[Tensor], penalties: list[Tensor], scale: Tensor, given: list[Tensor]) -> list[Tensor]:
    """The outputs with the penalties behind them; inside `torch.vmap`, where autograd is: one level below."""
    if _are_functorch_transforms_active():
        if torch.compiler.is_compiling():
            if any(map(is_batchedtensor, (*outputs, *penalties))) and not any(one.requires_grad for one in outputs):
                raise FxregError(
                    "emit='backward': the module is called inside torch.vmap, and what is compiled differentiates "
                    "outside of it. Leave out fullgraph=True, or use emit='output'."
                )
        elif (level := retrieve_current_functorch_interpreter()).key() == TransformType.Vmap:
            below = [_unwrap_batched(one, level.level()) for one in (*outputs, *penalties)]
            before = [_unwrap_batched(one, level.level())[0] for one in given]
            with level.lower():
                terms = [one.sum() for one, _ in below[len(outputs) :]]  # each sample, or model, has its own
                found = _attached([one for one, _ in below[: len(outputs)]], terms, scale, before)
            return [
                one if place is None else _add_batch_dim(one, place, level.level())
                for one, (_, place) in zip(found, below, strict=False)
            ]
    result: list[Tensor] = _attach_operator(outputs, penalties, scale, given)
    return result


def add_to_loss(output: Any, penalty: Tensor, training: bool) -> Any:
    """The output with the penalty added to its loss, in training mode."""
    if not training:
        return output
    penalty = apart.value(penalty)
    if isinstance(output, Tensor):
        return _checked_loss(output, "the output") + penalty.to(output.device)
    loss = _checked_loss(loss_in(output), f"the 'loss' field of the {type(output).__name__} it returned")
    return replace_field(output, "loss", loss + penalty.to(loss.device))


def expect_tensor(value: Any, what: str) -> Any:
    """The value; an error unless it is a tensor, which is what capture took it for."""
    if not isinstance(value, Tensor):
        raise CaptureError(
            f"{what} is a {type(value).__name__}, but the model was captured for a tensor. Capture it with "
            "example_inputs= of the kind you call it with."
        )
    return value


def expect_some(value: Any, what: str) -> Any:
    """The value; an error if it is None, which is not what capture took it for."""
    if value is None:
        raise CaptureError(
            f"{what} is None, but the model was captured for something else. Capture it with example_inputs= of the "
            "kind you call it with."
        )
    return value


def expect_like(value: Any, kind: Any, what: str) -> Any:
    """The value; an error unless it has tensors, and nothing, where it had them when the model was captured."""
    if likeness(value) != kind:
        raise CaptureError(
            f"{what} was {kind} when the model was captured, and is {likeness(value)} now. Capture it with "
            "example_inputs= of the kind you call it with."
        )
    return value


def expect_assumed(state: Any, arguments: list[Any], which: int = 0) -> None:
    """An error unless what a recorded graph assumes holds for these arguments."""
    if not state.assumes(*arguments, which=which):
        raise CaptureError(
            "the graph was recorded on an example and does not hold for this call (another kind of argument, size, "
            "mode, data type or device). Call the module that fxreg.transform returned: it has another graph for it."
        )


def expect_same(value: Any, expected: Any, what: str) -> None:
    """An error unless a number is what it was when the model was captured, where a forward asked for it."""
    # Truth values are branched on, not compared: Dynamo's symbolic ones cannot be.
    if (bool(value) is not expected) if isinstance(expected, bool) else value != expected:
        raise CaptureError(
            f"the forward asks for {what}, which was {expected!r} when the model was captured and is {value!r} now. "
            "Capture it with example_inputs= of the kind you call it with."
        )


def expect_valid(valid: Tensor, always: bool) -> None:
    """An error where the model raises one: a distribution of torch's checks its parameters, or a value.

    Args:
        always: whether it was asked to, and does not just do so by default.
    """
    if (always or Distribution._validate_args) and not valid:
        raise ValueError("a distribution was given parameters, or a value, that do not satisfy its constraints.")


def by_mode(training: bool, one: Any, other: Any) -> Any:
    """The first in training, the second in evaluation."""
    return one if training else other


def make(recipe: Any, parts: list[Any]) -> Any:
    """A new object, of the kind that the forward made when it was recorded."""
    return follow(recipe, parts)


def refuse(message: str) -> None:
    """What a graph does that would be wrong: an error."""
    raise CaptureError(message)


def passes(values: tuple[Any, ...], path: str, on: str) -> None:
    """Here activations of a module pass: a mark for the stage that writes penalties, which takes it away."""


def unpack(value: Any, count: int, what: str = "") -> tuple[Any, ...]:
    """The `count` parts of a value, as Python unpacks it; or as there were when the model was captured."""
    parts = tuple(value)
    if len(parts) != count and what:
        raise CaptureError(
            f"{what} had {count} parts when the model was captured, and has {len(parts)} now. Capture it with "
            "example_inputs= of the kind you call it with."
        )
    if len(parts) != count:
        raise ValueError(f"expected {count} values to unpack, got {len(parts)}")
    return parts


def expect_given(value: Any, name: str) -> None:
    """An error if an argument was left out whose default the code cannot say."""
    if value is ...:
        raise CaptureError(
            f"argument {name!r} was left out, and its default is nothing that a graph's code can say. Pass it, or "
            "capture the model without an example of it."
        )


def expect_default(value: Any, default: Any, name: str) -> None:
    """An error unless an argument is left at the default that capture fixed."""
    if value is not default and not (type(value) is type(default) and value == default):
        raise CaptureError(
            f"argument {name!r} was fixed at its default {default!r} when the model was captured. To pass it, give "
            "transform an example of it in example_inputs=."
        )


def _checked_loss(loss: Any, where: str) -> Tensor:
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.ndim == 0 and loss.is_floating_point():
        return loss
    got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
    raise FxregError(
        f"emit='loss': {where} must be a scalar loss, but it is {got}. Give the model what it needs to compute its "
        "loss, or use emit='backward' or emit='output'."
    )
