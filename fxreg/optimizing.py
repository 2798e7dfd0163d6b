"""Parameter groups for the rules that an optimizer carries out."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from .capture import capture
from .captured import Captured
from .decorating import OptimizerOption
from .effects import Penalty
from .errors import RuleError
from .exported import as_module, read_program
from .files import Rules, given_rules
from .matching import match
from .module import bind, is_emitted, original, state_of, uncompiled
from .planning import LeaveToCompanion, plan
from .resolving import resolve

_COUPLED = (
    torch.optim.SGD, torch.optim.ASGD, torch.optim.Adam, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop,
)  # fmt: skip
"""The classes whose `weight_decay=d` adds d·w to the gradient before anything else. AdamW is a subclass of Adam, so
these are compared by identity."""


def param_groups(
    model: nn.Module | ExportedProgram,
    rules: Rules,
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
    *,
    groups: Iterable[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Parameter groups that make an optimizer carry out the `via="optimizer"` rules.

    l2 of strength s becomes the coupled `weight_decay=2s`; `weight_decay(d)` becomes `weight_decay=d`, whatever the
    optimizer makes of it. Every trainable parameter appears once, tied ones too; all others have `weight_decay=0.0`.

    Args:
        model: the model or exported program, or what `fxreg.transform` made of it.
        rules: the rules given to `fxreg.transform`; those with another `via` are left to it.
        optimizer: the class the groups are for.
        groups: groups with an `lr` or other options of their own, as the optimizer takes them: each is divided by what
            the rules say, and keeps its options. Parameters that are in none of them have the optimizer's defaults.

    Returns:
        Groups for the optimizer's first argument.

    Raises:
        RuleError: the class has no `weight_decay`, or one that is not coupled although an l2 rule needs it to be; a
            group with a `weight_decay` of its own, or with what is no parameter of the model, or is in two of them.
        MatchError: as `fxreg.transform`.
        CaptureError: a rule for a position in the graph (`fxreg.last()`, …) that a capture without examples does not
            show; pass what `fxreg.transform` returned.

    >>> import torch, fxreg
    >>> model = torch.nn.Linear(4, 2)
    >>> rules = [fxreg.Rule(fxreg.l2(0.1), param="weight", via="optimizer")]
    >>> groups = fxreg.param_groups(model, rules, torch.optim.SGD)
    >>> [(group["weight_decay"], len(group["params"])) for group in groups]
    [(0.2, 1), (0.0, 1)]
    >>> optimizer = torch.optim.SGD(groups, lr=0.1)
    >>> slow = [{"params": [model.bias], "lr": 0.01}]
    >>> groups = fxreg.param_groups(model, rules, torch.optim.SGD, groups=slow)
    >>> [(group.get("lr"), group["weight_decay"]) for group in groups]
    [(0.01, 0.0), (None, 0.2)]
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise RuleError(
            f"param_groups: optimizer must be an optimizer class such as torch.optim.SGD, got {optimizer!r}."
        )
    if not isinstance(model, nn.Module | ExportedProgram):
        raise RuleError(f"param_groups: model must be an nn.Module or an ExportedProgram, got {model!r}.")
    given, model = model, original(as_module(model))
    matches = tuple(one for one in match(model, given_rules(rules)) if one.rule.lowering == "optimizer")
    if any(one.position for one in matches):
        matches = resolve(model, matches, _captured(given))
    edits = plan(matches).companions("optimizer")
    options = inspect.signature(optimizer).parameters
    decay: dict[str, float] = {}
    pinned: dict[str, bool] = {}
    for edit in edits:
        decay[edit.site] = decay.get(edit.site, 0.0) + _decay(edit, optimizer, options)
        if isinstance(edit.effect.definition, Penalty) and "decoupled_weight_decay" in options:
            pinned[edit.site] = False
    found: list[dict[str, Any]] = []
    for kept, entries in _divided(groups, model):
        divided: dict[tuple[float, bool | None], dict[str, Any]] = {}
        for name, entry in entries.items():
            key = (decay.get(name, 0.0), pinned.get(name))
            extra = {} if key[1] is None else {"decoupled_weight_decay": key[1]}
            group = {**kept, "params": [], "weight_decay": key[0], **extra}
            divided.setdefault(key, group)["params"].append(entry)
        found += sorted(divided.values(), key=lambda group: -group["weight_decay"])
    if "weight_decay" not in options:
        for group in found:
            del group["weight_decay"]
    bind(model, edits)
    return found


def _divided(groups: Iterable[Mapping[str, Any]], model: nn.Module) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The options of every group, and what it has of the trainable parameters, by name; last, those that are in none.

    What it has is the parameter or, as the optimizer takes it too, its name and itself; either everywhere, or nowhere.
    """
    left: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
    names, are_named = dict(left), False
    for which, group in enumerate(groups):
        where = f"param_groups: groups[{which}]"
        if not isinstance(group, Mapping) or "params" not in group:
            raise RuleError(f"{where} must be a dict with 'params', got {group!r}.")
        if "weight_decay" in group:
            raise RuleError(f"{where} has a weight_decay of its own. Say it by a rule, such as fxreg.weight_decay(d).")
        own: dict[str, Any] = {}
        for entry in [group["params"]] if isinstance(group["params"], Tensor) else group["params"]:
            are_named |= isinstance(entry, tuple)
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if not isinstance(parameter, Tensor) or parameter not in names:
                raise RuleError(f"{where} has a {type(parameter).__name__} that is no parameter of the model.")
            if parameter not in left:
                raise RuleError(f"{where} has {names[parameter]!r}, which is in a group already. Keep it in one.")
            name = left.pop(parameter)
            if parameter.requires_grad:
                own[name] = entry
        yield {option: value for option, value in group.items() if option != "params"}, own
    yield {}, {name: (name, p) if are_named else p for p, name in left.items() if p.requires_grad}


def _captured(model: nn.Module | ExportedProgram) -> Captured:
    """The graph that a model was transformed with, or else one of its own."""
    if isinstance(model, ExportedProgram):
        return read_program(model)[1]
    return state_of(model).captured if is_emitted(model) else capture(uncompiled(model))


def _decay(edit: LeaveToCompanion, optimizer: type, options: Any) -> float:
    definition = edit.effect.definition
    if "weight_decay" not in options:
        raise RuleError(
            f"rule {edit.label!r}: {optimizer.__name__} has no weight_decay to carry out {edit.effect!r} with. Use "
            "another optimizer, or via='penalty'."
        )
    (strength,) = edit.effect.strengths.values()
    if isinstance(definition, OptimizerOption):
        return strength
    assert isinstance(definition, Penalty)
    assert definition.weight_decay is not None
    if optimizer not in _COUPLED:
        raise RuleError(
            f"rule {edit.label!r}: {edit.effect!r} is exact only where weight_decay is added to the gradient, and "
            f"{optimizer.__name__} is not known to do that. Use one of {', '.join(c.__name__ for c in _COUPLED)}; or "
            "via='penalty'; or fxreg.weight_decay(d) if the optimizer's own decay is what you want."
        )
    return definition.weight_decay * strength
