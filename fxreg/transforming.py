"""The way in: match, plan, capture, emit, in that order; and the way back."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch
from torch import nn
from torch.export import ExportedProgram

from .capture import Examples, capture, refuse_transformed, split_examples
from .captured import Captured
from .emitting import verified
from .errors import CaptureError, FxregError
from .exported import read_program
from .files import Rules, given_rules
from .islands import islands
from .lowering import lower
from .matching import match
from .module import forget_given, state_of
from .planning import Emit, Plan, plan
from .rematching import remember_meaning
from .resolving import resolve
from .watching import watch


def transform(
    model: nn.Module | ExportedProgram,
    rules: Rules,
    *,
    example_inputs: Examples | None = None,
    emit: Emit = "backward",
) -> torch.fx.GraphModule:
    """Capture a model, rewrite its graph as the rules say, and return the module to train.

    The returned module *shares* parameters, buffers, submodules and mode with the model, which stays the thing to
    evaluate, checkpoint and ship. Training it trains loss + Σ s_k·R_k.

    Args:
        model: any `nn.Module`, an `fx.GraphModule` among them, or what `torch.export.export` returned. It is not
            changed. An exported program is trained in the mode in which it was exported.
        rules: the rules, or the path of a file with them; every one that matches acts, in this order.
        example_inputs: a tuple (positional) or a dict (keyword) of inputs. With it the result is verified against
            the model in train and in eval mode before it is returned. With or without, an argument that has a default
            and is not among the examples is fixed at its default, and passing another value later raises.
        emit: where the total penalty goes. `"backward"`: the output is the model's, and the backward pass adds the
            penalty's gradient. `"output"`: the output becomes `(output, penalty)`. `"loss"`: the penalty is added to
            the loss that the model returns (a scalar, or the field `loss`), in training mode only.

    Raises:
        RuleError: a malformed rule.
        MatchError: a rule that matches nothing, a duplicate, a contradiction.
        CaptureError: a model that cannot be captured, a transform that cannot be shown to hold, or a position that the
            graph does not show.
        VerifyError: with `example_inputs`, a result that differs from the model and the rules.

    >>> import torch, fxreg
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    >>> gm = fxreg.transform(model, [fxreg.Rule(fxreg.l2(1e-2), layer="Linear", param="weight")])
    >>> x = torch.randn(2, 4)
    >>> torch.equal(gm(x), model(x))
    True
    """
    if not isinstance(model, nn.Module | ExportedProgram):
        raise CaptureError(f"model must be an nn.Module or an ExportedProgram, got {type(model).__name__}.")
    if emit not in get_args(Emit):
        raise FxregError(f"emit must be one of {', '.join(map(repr, get_args(Emit)))}, got {emit!r}.")
    if example_inputs is not None:
        split_examples(example_inputs)
    captured: Captured | None = None
    root = model
    if isinstance(root, ExportedProgram):
        root, captured = read_program(root)
        if emit == "loss" and not root.training:
            raise CaptureError(
                "emit='loss' adds penalties in train mode only, and this program was exported in eval mode. Export the "
                "model again after model.train(), or use emit='backward' or emit='output'."
            )
    refuse_transformed(root)
    with _without_collection():
        rules = given_rules(rules)
        matches = match(root, rules)
        planned = plan(matches)
        if captured is not None and planned.on_forward:
            raise CaptureError(
                f"rule {planned.on_forward[0].label!r} is on activations, and an exported program no longer tells "
                "which of its values were a layer's. Transform the model that was exported."
            )
        marked = frozenset(site for edit in planned.activations for site in edit.sites if edit.op is None)
        captured = captured or capture(root, example_inputs, marked)
        planned = plan(resolve(root, matches, captured)) if planned.is_open else planned
        gm = lower(root, captured, planned, emit)
    if example_inputs is not None:
        gm = verified(gm, model, example_inputs)
        state = state_of(gm)
        if any(m.position for m in matches) and plan(resolve(root, matches, state.captured)) != planned:
            raise CaptureError(
                "positions in the graph were asked of a recording that is not the model, and another graph says "
                "something else of them. Select by name= instead of where=."
            )
        vars(state)["islands"] = islands(root, state.captured, example_inputs)
    with _without_collection():
        forget_given(state_of(gm))
        remember_meaning(gm, rules)
        watch(gm)
    return gm


@contextmanager
def _without_collection() -> Iterator[None]:
    """Graphs are many objects and no garbage: the collector would walk over everything alive, again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def strip(gm: nn.Module) -> torch.fx.GraphModule:
    """The same graph without anything fxreg inserted: a new module that shares the state.

    Its code is that of `transform(model, [])`.

    Raises:
        FxregError: not a module that `fxreg.transform` returned.

    >>> import torch, fxreg
    >>> model = torch.nn.Linear(4, 2)
    >>> gm = fxreg.transform(model, [fxreg.Rule(fxreg.l1(0.1))])
    >>> fxreg.strip(gm).code == fxreg.transform(model, []).code
    True
    """
    state = state_of(gm)
    return lower(state.model, state.captured, Plan(()), "backward")
