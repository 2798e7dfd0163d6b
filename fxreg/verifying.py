"""verify: (emitted module, model, examples) → nothing, or a VerifyError.

It re-derives everything the hard way: outputs and buffers from the original model, gradients from autograd of the
original model plus the rules' formulas. None of the emitted operators is used on the reference side.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from .capture import Examples, split_examples
from .controls import activation_value, function_value
from .errors import FxregError, VerifyError
from .exported import ExportedModule
from .module import State, emitted, is_emitted, state_of, uncompiled
from .observing import observing
from .rederiving import Gradients, moved, muting, objective, silent, with_rules
from .rematching import check_meaning
from .snapshots import borrowed, iterator_kept
from .structure import fresh, likeness, loss_in, map_tensors, tensors

_GRADIENT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE_TOLERANCE = 5e-2  # 16-bit: a few units in the last place of a sum


@torch.enable_grad()
def verify(gm: nn.Module, model: nn.Module | ExportedProgram, example_inputs: Examples) -> None:
    """Compare an emitted module with the model and the rules it came from.

    In train and in eval mode: outputs bitwise; every buffer after the call; the gradient of every parameter, and of
    every input that requires one, for all outputs together; the rules' part of it alone through each single output.
    Parameters at which a penalty has no gradient, or before which none arrives, are moved meanwhile.
    RNG, buffers, attributes, modes and `.grad` are left as they were found. What was made from an exported program has
    one mode.

    Args:
        gm: what `fxreg.transform` returned.
        model: what it was made from, compiled or not; for an exported program, that or the model that was exported.
        example_inputs: a tuple (positional) or a dict (keyword).

    Raises:
        VerifyError: the first difference, with its place and size.
        CaptureError: the model changed, and the rules mean something else.

    >>> import torch, fxreg
    >>> model = torch.nn.Linear(4, 2)
    >>> gm = fxreg.transform(model, [fxreg.Rule(fxreg.l1(0.1))])
    >>> fxreg.verify(gm, model, (torch.randn(3, 4),))
    """
    args, kwargs = split_examples(example_inputs)
    state = state_of(gm)
    inner = emitted(gm)
    check_meaning(inner)
    modes: tuple[bool, ...] = (True, False)
    if isinstance(state.model, ExportedModule):
        args, kwargs = state.model.exported_inputs.arranged(args, kwargs)
        modes = (state.model.training,)
    if isinstance(model, ExportedProgram):
        model = model.module()
    names = [n for n, _ in inner.named_parameters()]
    if names != [n for n, _ in model.named_parameters()]:  # unless it is what was transformed, compiled as it was
        inside: nn.Module = uncompiled(model)
        model = inside
    if kept := iterator_kept(model):
        raise VerifyError(
            f"{kept[0] or 'the model'} keeps an iterator in {kept[1]!r}, and running it would move it for good. Verify "
            "without it, or leave out example_inputs."
        )
    if names != [n for n, _ in model.named_parameters()]:
        raise VerifyError("the emitted module's parameters are not the model's, by name and order.")
    for (name, own), original in zip(inner.named_parameters(), model.parameters(), strict=True):
        if own is not original:
            raise VerifyError(f"parameter {name!r} of the emitted module is not the model's own tensor.")
    still = silent(state)
    for training in modes:
        mode = "in train mode" if training else "in eval mode"
        with borrowed(model, [state], training) as reset:
            output = _call(model, args, kwargs)
            if [n for n, _ in inner.named_parameters()] != names:
                raise VerifyError(
                    f"{mode}: the forward itself ties parameters, or takes some away or adds some. Call the model once "
                    "before it is transformed, or leave out example_inputs."
                )
            whole, *single = _trials([k for k, tensor in enumerate(tensors(output)) if tensor.requires_grad])
            side_by_side = _SideBySide(gm, model, state, args, kwargs, reset, mode)
            if not still or state.provenance.emit == "loss":
                gradients = side_by_side.compare([whole, *single], still)
            else:
                gradients = side_by_side.compare([whole])
                side_by_side.compare(single, still)
            if gradients is not None and (zeros := muting(state, gradients)):
                side_by_side.compare([whole], zeros)


@dataclass(frozen=True)
class _Trial:
    """What a backward pass looks at: some outputs, with a weight."""

    outputs: tuple[int, ...]
    weight: float
    name: str


def _trials(live: Sequence[int]) -> Iterator[_Trial]:
    """All outputs at once; then each alone with weight 0, which leaves what the rules add, to its own precision."""
    yield _Trial(tuple(live), 1.0, "all outputs")
    for k in live[:8]:
        yield _Trial((k,), 0.0, f"output {k} alone with weight 0")


@dataclass(frozen=True)
class _Run:
    """One forward pass, and a backward pass for each trial.

    Attributes:
        output: detached.
        penalty: the second half of what emit='output' returns.
        on_forward: of the model itself, the rules' penalties on its activations and its function.
        added: the gradients of those on activations.
        beside: the gradients of those on the function, which reads parameters raw.
        buffers: after the forward pass.
        gradients: by trial, of every trainable parameter, and of every input that asks for one.
        is_rough: whether those of penalties pass through 16-bit values, which round them alone otherwise than with the
            loss's.
    """

    output: Any
    penalty: Tensor | None
    buffers: Mapping[str, Tensor]
    gradients: Mapping[_Trial, Gradients]
    on_forward: Tensor | None
    added: Gradients
    beside: Gradients
    is_rough: bool


@dataclass(frozen=True)
class _SideBySide:
    """The emitted module and the model, in one mode."""

    gm: nn.Module
    model: nn.Module
    state: State
    args: Any
    kwargs: Any
    reset: Callable[[], None]
    mode: str

    def compare(self, trials: Sequence[_Trial], elsewhere: Sequence[Tensor] = ()) -> Gradients | None:
        """Compare the two in all trials, with some parameters at another place; the model's gradients in the first
        trial, if there is one and the model does not fail.

        The trials share a forward pass where its graph bears several backward passes. Where the two do not agree then,
        each trial has a forward pass of its own, and that decides.
        """
        known: dict[Any, Tensor] = {}
        if len(trials) > 1 and not any(map(_holds_compiled, (self.gm, self.model))):
            with contextlib.suppress(VerifyError):
                return self._compare_once(trials, elsewhere, known)
        return next(iter([self._compare_once([trial], elsewhere, known) for trial in trials]), None)

    def _compare_once(
        self, trials: Sequence[_Trial], elsewhere: Sequence[Tensor], known: dict[Any, Tensor]
    ) -> Gradients | None:
        """The same in one forward pass; the penalties' gradients may be known."""
        where = f"{self.mode}, {trials[0].name}"
        self.reset()
        try:
            with moved(elsewhere):
                theirs = self._observe(self.model, trials)
        except RuntimeError as failure:
            if len(trials) > 1:
                raise VerifyError(f"{self.mode}: {failure}") from failure
            self._expect_failure(trials, f"{where}: {failure}")
            return None
        self.reset()
        with moved(elsewhere):
            try:
                ours = self._observe(self.gm, trials)
            except FxregError:
                raise
            except Exception as failure:
                raise VerifyError(
                    f"{where}: the emitted module raises {type(failure).__name__}, and the model does not: {failure}"
                ) from failure
            for trial in trials:
                _compare(self.state, theirs, ours, trial, f"{self.mode}, {trial.name}", known)
        return theirs.gradients[trials[0]]

    def _expect_failure(self, trials: Sequence[_Trial], what: str) -> None:
        """The model itself has no gradient here: it writes into what it needs for it, say."""
        self.reset()
        try:
            self._observe(self.gm, trials)
        except RuntimeError:
            return
        raise VerifyError(f"{what}, says the model itself, and the emitted module does not fail.")

    def _observe(self, module: nn.Module, trials: Sequence[_Trial]) -> _Run:
        return _observe(module, self.state, trials, *map_tensors(fresh, (self.args, self.kwargs)))


def _call(module: nn.Module, args: Any, kwargs: Any) -> Any:
    args, kwargs = map_tensors(fresh, (args, kwargs))
    return module(*args, **kwargs)


def _observe(module: nn.Module, state: State, trials: Sequence[_Trial], args: Any, kwargs: Any) -> _Run:
    """One forward pass of the model or of the emitted module."""
    ours = is_emitted(module)
    passing: list[Tensor] = []
    edits = () if ours else state.provenance.plan.activations
    with observing(module, edits, lambda edit, one: passing.append(activation_value(state, edit, one))):
        output = module(*args, **kwargs)
    functions = () if ours else state.provenance.plan.functions
    beside = [function_value(state, edit, module, args, kwargs) for edit in functions]
    buffers = {name: buffer.detach().clone() for name, buffer in state.model.named_buffers()}
    parameters: dict[str, Tensor] = {name: p for name, p in state.model.named_parameters() if p.requires_grad}
    parameters |= {f"input {k}": t for k, t in enumerate(tensors((args, kwargs))) if t.requires_grad and t.is_leaf}
    penalty = None
    if ours and state.provenance.emit == "output":
        if not isinstance(output, tuple) or len(output) != 2 or not isinstance(output[1], Tensor):
            raise VerifyError(f"emit='output' must return (output, penalty), got {type(output).__name__}.")
        output, penalty = output
    found = list(tensors(output))
    gradients: dict[_Trial, Gradients] = {}
    for trial in trials:
        lost = [k for k in trial.outputs if k >= len(found) or not found[k].requires_grad]
        if lost:
            raise VerifyError(f"{trial.name}: output {lost[0]} lost its gradient.")
        terms = [_probe(found, trial)] if trial.outputs else []
        if penalty is not None and penalty.requires_grad:
            terms.append(penalty)
        gradients[trial] = dict.fromkeys(parameters)
        if (total := _total(terms)) is not None and parameters:
            gradients[trial] = _gradients(total, parameters, any(map(_holds_compiled, (module, state.model))))
    on_forward = _total([term.detach() for term in (*passing, *beside)])
    is_rough = any(map(_meets_16_bits, (*passing, *beside)))
    added, raw = (_gradients_of(_total(terms), parameters) for terms in (passing, beside))
    return _Run(map_tensors(Tensor.detach, output), penalty, buffers, gradients, on_forward, added, raw, is_rough)


def _holds_compiled(module: nn.Module) -> bool:
    """Whether a module, or one inside it, was compiled: then its graph bears one backward pass."""
    return any(uncompiled(one) is not one for one in module.modules())


def _meets_16_bits(penalty: Tensor) -> bool:
    """Whether a gradient is rounded to 16 bits on its way from a penalty to the parameters: in autocast, say."""
    waiting, seen = [penalty.grad_fn], set[Any]()
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if any(one.dtype.itemsize < 4 for one in node._input_metadata):  # private: no public way to ask
            return True
        waiting += [before for before, _ in node.next_functions]
    return False


def _total(terms: Sequence[Tensor]) -> Tensor | None:
    return torch.stack([term.to(terms[0]) for term in terms]).sum() if terms else None


def _gradients_of(penalty: Tensor | None, parameters: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    return {} if penalty is None or not penalty.requires_grad else _gradients(penalty, parameters, compiled=False)


def _compare(state: State, theirs: _Run, ours: _Run, trial: _Trial, where: str, known: dict[Any, Tensor]) -> None:
    emit = state.provenance.emit
    reference = None if emit == "backward" else objective(state, theirs.on_forward)
    if type(theirs.output) is not type(ours.output) and not isinstance(theirs.output, Tensor):
        raise VerifyError(
            f"{where}: the model returns a {type(theirs.output).__name__}, the emitted module a "
            f"{type(ours.output).__name__}."
        )
    if likeness(theirs.output) != likeness(ours.output):
        raise VerifyError(
            f"{where}: the model returns {likeness(theirs.output)}, the emitted module {likeness(ours.output)}."
        )
    expected, actual = list(tensors(theirs.output)), list(tensors(ours.output))
    if len(expected) != len(actual):
        raise VerifyError(f"{where}: the model returns {len(expected)} tensors, the emitted module {len(actual)}.")
    # What the penalty nodes' gradients arrive with, if they arrive.
    injected = float(state.loss_scale) if trial.outputs else None
    weight = {"backward": injected, "output": 1.0, "loss": None}[emit]
    for k, (one, other) in enumerate(zip(expected, actual, strict=True)):
        is_loss = emit == "loss" and state.model.training and one is loss_in(theirs.output)
        if is_loss and reference is not None:
            weight = trial.weight * math.cos(1 + k) if k in trial.outputs else None
            _compare_tensors(one + reference, other, f"{where}: the loss", exact=False)
        else:
            _compare_tensors(one, other, f"{where}: output {k}", exact=True)
    if ours.penalty is not None:
        wanted = torch.zeros_like(ours.penalty) if reference is None else reference
        _compare_tensors(wanted, ours.penalty, f"{where}: the penalty", exact=False)
    for name, buffer in theirs.buffers.items():
        _compare_tensors(buffer, ours.buffers[name], f"{where}: buffer {name!r} after the call", exact=True)
    gradients = with_rules(state, theirs.gradients[trial], theirs.added, theirs.beside, weight, known)
    rounding = _rounding(gradients.values()) if state.provenance.plan.on_forward else 0.0
    for name, gradient in gradients.items():
        tolerance = _COARSE_TOLERANCE if theirs.is_rough or gradient is None else _tolerance(gradient.dtype)
        _compare_gradient(gradient, ours.gradients[trial][name], f"{where}: gradient of {name!r}", tolerance, rounding)


def _probe(outputs: Sequence[Tensor], trial: _Trial) -> Tensor:
    """A linear scalar function that looks at every element of the chosen outputs, differently."""
    terms = []
    for k in trial.outputs:
        flat = outputs[k].reshape(-1)
        flat = flat.real + flat.imag if flat.is_complex() else flat
        index = torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device)
        terms.append((flat * (trial.weight * torch.cos(index + k)).to(flat.dtype)).sum())
    return torch.stack([term.to(terms[0]) for term in terms]).sum()


def _gradients(loss: Tensor, parameters: Mapping[str, Tensor], compiled: bool) -> dict[str, Tensor | None]:
    try:
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=not compiled, allow_unused=True)
        return dict(zip(parameters, map(_dense, found), strict=True))
    except RuntimeError as error:
        if "checkpoint" not in str(error):
            raise
    held = {name: parameter.grad for name, parameter in parameters.items()}  # reentrant: refuses autograd.grad
    try:
        for parameter in parameters.values():
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return {name: _dense(parameter.grad) for name, parameter in parameters.items()}
    finally:
        for name, parameter in parameters.items():
            parameter.grad = held[name]


def _dense(gradient: Tensor | None) -> Tensor | None:
    """The gradient of an embedding may be sparse; what the rules make of it is not."""
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def _compare_tensors(expected: Tensor, actual: Tensor, what: str, exact: bool) -> None:
    if expected.shape != actual.shape or (exact and expected.dtype != actual.dtype):
        raise VerifyError(
            f"{what}: expected {expected.dtype} {tuple(expected.shape)}, got {actual.dtype} {tuple(actual.shape)}."
        )
    exact = exact and expected.device.type == "cpu"
    tolerance = 0.0 if exact else _tolerance(expected.dtype)
    close = torch.isclose(
        actual.detach().to(expected), expected.detach(), rtol=tolerance, atol=tolerance * 1e-3, equal_nan=True
    )
    if not bool(close.all()):
        worst = (actual.detach().to(expected) - expected.detach()).abs().max()
        raise VerifyError(f"{what} differs from the model's by up to {float(worst):.3g}.")


def _rounding(gradients: Iterable[Tensor | None]) -> float:
    """How far two sums are apart that are made in another order: a share of the largest gradient, which the smaller
    ones passed through the same activations, and may have cancelled from."""
    found = [g for g in gradients if g is not None]
    return max((float(g.detach().norm().nan_to_num()) * _tolerance(g.dtype) * 1e-2 for g in found), default=0.0)


def _compare_gradient(
    expected: Tensor | None, actual: Tensor | None, what: str, tolerance: float, rounding: float
) -> None:
    if expected is None or actual is None:
        if (expected is None) != (actual is None):
            raise VerifyError(f"{what}: expected {_kind(expected)}, got {_kind(actual)}.")
        return
    wide = torch.promote_types(expected.dtype, torch.float32)
    difference = float(torch.linalg.vector_norm((actual.to(wide) - expected.to(wide)).nan_to_num()))
    norm = float(torch.linalg.vector_norm(expected.to(wide).nan_to_num()))
    if not torch.equal(expected.isnan(), actual.isnan()) or difference > tolerance * norm + rounding + 1e-12:
        raise VerifyError(f"{what} is off by {difference:.3g} (2-norm) where the model and the rules give {norm:.3g}.")


def _kind(gradient: Tensor | None) -> str:
    return "none" if gradient is None else "one"


def _tolerance(dtype: torch.dtype) -> float:
    return _GRADIENT_TOLERANCE.get(dtype, _COARSE_TOLERANCE)
