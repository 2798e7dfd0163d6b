"""What can be read and set while training: strengths, the loss scale, the penalties' values."""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import checked_strength
from .effects import Effect, Penalty, strength_name
from .errors import FxregError, RuleError
from .module import State, emitted, state_of
from .observing import observing, slopes
from .penalty_calls import reduced, summed_squares
from .planning import OnForward, OnParameter, PenalizeActivation, PenalizeFunction
from .rematching import check_meaning
from .snapshots import borrowed
from .structure import fresh, map_tensors


class _UnknownLabelError(FxregError, KeyError):
    """A label that no rule has."""

    __str__ = Exception.__str__  # KeyError would show the repr


class Strengths(MutableMapping[str, Tensor]):
    """`{label: 0-d tensor}`, live: what is written is effective at the next forward call, without recompiling."""

    def __init__(self, state: State) -> None:
        self._state = state

    def __getitem__(self, label: str) -> Tensor:
        buffers = self._state.provenance.strengths
        if label not in buffers:
            raise _UnknownLabelError(
                f"no strength {label!r}; this module has {', '.join(map(repr, buffers)) or 'none'}."
            )
        return self._state.get_buffer(buffers[label])[0]

    def __setitem__(self, label: str, value: float | Tensor) -> None:
        buffer = self[label]
        if isinstance(value, Tensor) and value.device.type not in ("cpu", "meta"):
            # No look at the value: that would wait for the device.
            if value.ndim:
                raise RuleError(f"strengths[{label!r}]: a strength is a 0-d tensor, got shape {tuple(value.shape)}.")
            buffer.copy_(value.detach())
        else:
            buffer.fill_(checked_strength(value, f"strengths[{label!r}]"))

    def __delitem__(self, label: str) -> None:
        raise FxregError(f"strengths[{label!r}] cannot be deleted; set it to 0.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._state.provenance.strengths)

    def __len__(self) -> int:
        return len(self._state.provenance.strengths)

    def __contains__(self, label: object) -> bool:
        return label in self._state.provenance.strengths

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{label!r}: {float(value):g}' for label, value in self.items())}}}"


def strengths(gm: nn.Module) -> Strengths:
    """The strengths of an emitted module, by label; an effect with two has `label.l1` and `label.l2`.

    Write with `strengths(gm)["l1"] = 1e-3`, or with an in-place method of the tensor. The next forward call uses the
    new value; nothing is recompiled. Rules that only the optimizer acts on keep their strength in its groups.

    Raises:
        FxregError: not a module that `fxreg.transform` returned; an unknown label.
        RuleError: a value that is negative, infinite, NaN or not a number.

    >>> import torch, fxreg
    >>> gm = fxreg.transform(torch.nn.Linear(4, 2), [fxreg.Rule(fxreg.l1(0.1))])
    >>> fxreg.strengths(gm)["l1"] = 0.2
    >>> fxreg.strengths(gm)
    {'l1': 0.2}
    """
    return Strengths(state_of(gm))


def set_loss_scale(gm: nn.Module, scale: float | Tensor) -> None:
    """Tell an emitted module by what factor its caller scales the loss: injected gradients follow it.

    `1 / accumulation_steps`, a GradScaler's scale, or their product. Set it before the forward call. Only
    `emit="backward"` and `via="gradient"` need it: a penalty in the loss is scaled with the loss.

    Args:
        scale: a finite positive number or 0-d tensor; a tensor on a device is not looked at, so nothing waits for it.

    Raises:
        FxregError: a number that is not finite and positive; not a module that `fxreg.transform` returned.

    >>> import torch, fxreg
    >>> gm = fxreg.transform(torch.nn.Linear(4, 2), [fxreg.Rule(fxreg.l1(0.1))])
    >>> fxreg.set_loss_scale(gm, 1 / 4)
    """
    state = state_of(gm)
    if isinstance(scale, Tensor) and scale.device.type not in ("cpu", "meta") and scale.ndim == 0:
        state.loss_scale[0].copy_(scale.detach())
    else:
        try:
            value = checked_strength(scale, "set_loss_scale")
        except RuleError:
            value = 0.0
        if value == 0:
            raise FxregError(f"set_loss_scale: the scale is a finite positive number or 0-d tensor, got {scale!r}.")
        state.loss_scale.fill_(value)
    state.scale_was_set = True


@torch.no_grad()
def penalties(gm: nn.Module, /, *inputs: Any, **named: Any) -> dict[str, Tensor]:
    """Every penalty's value s·R now, by label: summed over its parameters, detached, without the loss scale.

    Args:
        gm: what `fxreg.transform` returned; no forward call is needed.
        inputs: only for rules on activations: the model runs on them, in its mode, and its state, RNG and buffers are
            put back.
        named: inputs by name, likewise: `fxreg.penalties(gm, **batch)`.

    Returns:
        0-d tensors, for every rule whose effect is a penalty, whatever its `via`.

    Raises:
        FxregError: rules on activations, and no inputs for a model that takes some; not a module that
            `fxreg.transform` returned.
        CaptureError: the model changed, and the rules mean something else.

    >>> import torch, fxreg
    >>> model = torch.nn.Linear(4, 2)
    >>> gm = fxreg.transform(model, [fxreg.Rule(fxreg.l1(0.5), label="sparse")])
    >>> value = fxreg.penalties(gm)["sparse"]
    >>> torch.allclose(value, 0.5 * sum(p.abs().sum() for p in model.parameters()))
    True
    """
    state = state_of(gm)
    check_meaning(emitted(gm))
    parameters = dict(emitted(gm).named_parameters())
    found: dict[str, Tensor] = {}
    plan = state.provenance.plan
    passing = state.captured.chain[-1].passing
    if plan.on_forward and not (inputs or named or (passing is not None and passing.takes_nothing)):
        raise FxregError(
            f"penalties: rule {plan.on_forward[0].label!r} is on activations, which depend on inputs. Pass them: "
            "fxreg.penalties(gm, *inputs), or by name."
        )

    def add(label: str, value: Tensor) -> None:
        found[label] = found[label] + value.to(found[label].device) if label in found else value

    for edit in plan.edits:
        if isinstance(edit, OnForward):
            add(edit.label, torch.zeros((), device=state.loss_scale.device))
        elif isinstance(edit.effect.definition, Penalty):
            live = live_strengths(state, edit.label, edit.effect)
            value = edit.effect.definition.formula.value(parameters[edit.site], live, live_arguments(state, edit))
            add(edit.label, value)
    if plan.on_forward:
        args, kwargs = map_tensors(fresh, (inputs, named))
        note = lambda edit, activation: add(edit.label, activation_value(state, edit, activation))  # noqa: E731
        # Torch's layers take other ways where no gradient is wanted.
        with (
            torch.enable_grad(),
            borrowed(state.model, [state], training=None),
            observing(state.model, plan.activations, note),
        ):
            state.model(*args, **kwargs)
            for edit in plan.functions:
                add(edit.label, function_value(state, edit, state.model, args, kwargs))
    return {label: value.detach() for label, value in found.items()}


def function_value(state: State, edit: PenalizeFunction, model: nn.Module, args: Any, kwargs: Any) -> Tensor:
    """What a rule's penalty on the function is, in the forward call behind the last one."""
    stream = None
    if edit.effect.definition.has_stream:
        stream = state.get_buffer(state.provenance.streams[edit.label, edit.site]).clone()
        stream[1] += 1
    found = slopes(model, args, kwargs, edit, stream)
    value = torch.stack([summed_squares(one) for _, gradients in found for one in gradients]).sum()
    value = value / edit.effect.arguments.get("samples", 1)
    (strength,) = live_strengths(state, edit.label, edit.effect).values()
    return reduced((strength.reshape(()).to(value.device) * value).to(value.dtype), found[0][0], edit.reduction)


def activation_value(state: State, edit: PenalizeActivation, activation: Tensor) -> Tensor:
    """What a rule's penalty is on one activation.

    Raises:
        RuleError: the formula does not fit it.
    """
    definition, live = edit.effect.definition, live_strengths(state, edit.label, edit.effect)
    assert isinstance(definition, Penalty)
    try:
        return reduced(definition.formula.value(activation, live, edit.effect.arguments), activation, edit.reduction)
    except FxregError:
        raise
    except Exception as error:
        raise RuleError(
            f"rule {edit.label!r}: {edit.effect!r} does not fit the {edit.site} of shape {tuple(activation.shape)}: "
            f"{error}. Mend the effect's arguments, or narrow the rule."
        ) from error


def state_dict(gm: nn.Module) -> dict[str, Tensor]:
    """What fxreg itself must remember to resume training, as copies: strengths, random streams, the loss scale, and the
    tensors that effects have for each parameter.

    It is kept apart from the model's own state, whose keys stay the model's.

    Raises:
        FxregError: not a module that `fxreg.transform` returned.

    >>> import torch, fxreg
    >>> gm = fxreg.transform(torch.nn.Linear(4, 2), [fxreg.Rule(fxreg.l1(0.1))])
    >>> fxreg.state_dict(gm)
    {'loss_scale': tensor([1.], dtype=torch.float64), 'strengths.l1': tensor([0.1000], dtype=torch.float64)}
    """
    return {name: buffer.detach().clone() for name, buffer in _remembered(state_of(gm)).items()}


def load_state_dict(gm: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take back what `fxreg.state_dict` gave, in place.

    Raises:
        FxregError: no mapping to tensors, keys or shapes that are not those of the rules, or a strength or loss scale
            that none can be; nothing is changed then.

    >>> import torch, fxreg
    >>> gm = fxreg.transform(torch.nn.Linear(4, 2), [fxreg.Rule(fxreg.l1(0.1))])
    >>> saved = fxreg.state_dict(gm)
    >>> fxreg.strengths(gm)["l1"] = 0.7
    >>> fxreg.load_state_dict(gm, saved)
    >>> fxreg.strengths(gm)
    {'l1': 0.1}
    """
    own = _remembered(state_of(gm))
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FxregError(f"load_state_dict: the state is a mapping of names to tensors, got {state!r}.")
    if own.keys() != state.keys():
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys(), key=str)
        raise FxregError(
            f"load_state_dict: the state is not of these rules: missing {missing}, unexpected {extra}. Transform the "
            "model with the rules and labels it was saved with."
        )
    for name, buffer in own.items():
        if buffer.shape != state[name].shape:
            raise FxregError(
                f"load_state_dict: {name!r} has shape {tuple(state[name].shape)}, expected {tuple(buffer.shape)}."
            )
    for name, value in state.items():
        is_scale = name == "loss_scale"
        if is_scale or name.startswith("strengths."):
            number = checked_strength(value.reshape(()), f"load_state_dict: {name!r}")
            if is_scale and number == 0:
                raise FxregError(f"load_state_dict: {name!r} is a finite positive number, got {number!r}.")
    for name, buffer in own.items():
        buffer.copy_(state[name])


def _remembered(state: State) -> dict[str, Tensor]:
    found = {"loss_scale": state.loss_scale}
    found |= {f"strengths.{label}": state.get_buffer(buffer) for label, buffer in state.provenance.strengths.items()}
    for (label, site), buffer in state.provenance.streams.items():
        found[f"streams.{label}.{site}"] = state.get_buffer(buffer)
    for place, buffer in state.provenance.anchors.items():
        found[f"anchors.{'.'.join(place)}"] = state.get_buffer(buffer)
    return found


def live_strengths(state: State, label: str, effect: Effect) -> dict[str, Tensor]:
    """An effect's strengths as they are now, by their own names; constants where only the optimizer acts."""
    buffers = state.provenance.strengths
    found = {}
    for name, initial in effect.strengths.items():
        public = strength_name(label, effect, name)
        found[name] = (
            state.get_buffer(buffers[public]) if public in buffers else torch.tensor(initial, dtype=torch.float64)
        )
    return found


def live_arguments(state: State, edit: OnParameter) -> dict[str, Any]:
    """An effect's named arguments for one parameter, with the tensors that it has for it."""
    anchors = state.provenance.anchors
    own = {name: (edit.label, name, edit.site) for name in edit.effect.definition.anchors}
    return dict(edit.effect.arguments) | {name: state.get_buffer(anchors[place]) for name, place in own.items()}
