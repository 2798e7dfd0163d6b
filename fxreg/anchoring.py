"""Which tensor of an effect's own a parameter gets: the one given under any of its names, or the parameter itself."""

import difflib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .arguments import ByName, are_equal
from .effects import Effect
from .errors import RuleError
from .sites import Site

_SHOWN = 3


def anchor_of(given: ByName | None, names: Sequence[str], parameter: Tensor) -> Any:
    """What was given for a parameter under the first of its names for which there is something."""
    if given is None:
        return parameter
    return next(given.tensors[name] for name in names if name in given.tensors)


def check_anchors(label: str, effect: Effect, sites: Sequence[Site], model: nn.Module) -> None:
    """Look at the tensors that an effect has for each parameter.

    Raises:
        RuleError: one that is missing, not a floating-point tensor, of another shape, without values, or another one
            under another name of the same parameter.
    """
    if not effect.definition.anchors:
        return
    parameters = dict(model.named_parameters())
    for argument in effect.definition.anchors:
        given = effect.arguments[argument]
        who = f"rule {label!r}: {effect.name}({argument}=…)"
        missing = [s for s in sites if isinstance(given, ByName) and not any(name in given.tensors for name in s.names)]
        if missing:
            raise RuleError(
                f"{who} has no tensor for {_listed(missing, given)}. Name it in the mapping, or narrow the rule."
            )
        for site in sites:
            parameter = parameters[site.name]
            own = anchor_of(given, site.names, parameter)
            if problem := _problem(own, parameter):
                raise RuleError(f"{who} for {site.name!r}: {problem}.")
            others = [given.tensors[name] for name in site.aliases if name in given.tensors] if given else []
            if not all(are_equal(own, other) for other in others):
                raise RuleError(
                    f"{who}: {', '.join(map(repr, site.names))} are one parameter, and their tensors differ. Give one."
                )


def _problem(own: object, parameter: Tensor) -> str | None:
    if not isinstance(own, Tensor):
        return f"expected a tensor, got {type(own).__name__}"
    if own.shape != parameter.shape:
        return f"expected a tensor of shape {tuple(parameter.shape)}, got {tuple(own.shape)}"
    if not own.is_floating_point():
        return f"expected a tensor of floating-point numbers, got {own.dtype}"
    if own.is_meta and own is parameter:
        return "the parameter is on the meta device and has no value to copy. Give its value in a mapping of names"
    return "the tensor is on the meta device and has no values" if own.is_meta else None


def _listed(missing: Sequence[Site], given: ByName) -> str:
    names = ", ".join(repr(site.name) for site in missing[:_SHOWN])
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    near = difflib.get_close_matches(missing[0].name, [str(name) for name in given.tensors], n=3, cutoff=0)
    found = f"nearest names given: {', '.join(map(repr, near))}" if near else "the mapping is empty"
    return f"{names}{more}; {found}"
