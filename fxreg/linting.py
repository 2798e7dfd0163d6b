"""lint: an emitted module, or a model and rules, with or without an optimizer → what is seldom meant."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet

import torch
from torch import nn
from torch.export import ExportedProgram

from .decorating import OptimizerOption
from .effects import Penalty
from .errors import FxregError, RuleError
from .exported import as_module
from .files import Rules, given_rules
from .flows import reached
from .invariance import Invariant, find_invariant
from .lints import NORMS, Lint, named
from .matching import match
from .module import State, is_emitted, original, state_of
from .planning import LeaveToCompanion, OnParameter, Plan, plan
from .regularizers import elastic_net, l2


def lint(
    model: nn.Module | ExportedProgram,
    rules: Rules | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    warn: bool = False,
) -> tuple[Lint, ...]:
    """Find what rules do that is seldom meant. Changes nothing.

    Args:
        model: what `fxreg.transform` returned; or, with rules, any model or exported program, whose graph is not looked
            at.
        rules: the rules to look at; none for an emitted module, which has its own.
        optimizer: the optimizer of the training, to look for decay that comes twice or that nobody asked for.
        warn: whether to give each lint as a `UserWarning` as well.

    Returns:
        The lints that `fxreg.explain` shows, and those about the optimizer.

    Raises:
        RuleError, MatchError: as `fxreg.transform`.
        FxregError: no rules, and not a module that `fxreg.transform` returned; an optimizer that is none.

    >>> import torch, fxreg
    >>> model = torch.nn.Linear(4, 2)
    >>> gm = fxreg.transform(model, [fxreg.Rule(fxreg.l2(1e-3), param="weight")])
    >>> [(lint.kind, lint.sites) for lint in fxreg.lint(gm, optimizer=torch.optim.AdamW(model.parameters()))]
    [('double-decay', ('weight',))]
    """
    if not isinstance(model, nn.Module | ExportedProgram):
        raise FxregError(f"lint: model must be an nn.Module or an ExportedProgram, got {model!r}.")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise FxregError(f"lint: optimizer must be a torch.optim.Optimizer, with its groups, got {optimizer!r}.")
    model = as_module(model)
    if rules is None:
        state = state_of(model)
        planned, found = state.provenance.plan, lint_emitted(state)
    elif is_emitted(model):
        raise RuleError("lint(gm) takes no rules: they are in the module. Leave them out, or pass the model.")
    else:
        planned = plan(match(model, given_rules(rules)))
        found = planned.lints
    if optimizer is not None:
        found += tuple(_lint_decays(original(model), planned, optimizer))
    for one in found if warn else ():
        warnings.warn(f"fxreg: {one}", stacklevel=2)
    return found


def lint_emitted(state: State) -> tuple[Lint, ...]:
    """The lints of a plan that was carried out: of its rules, and of the graph."""
    planned, model, graphs = state.provenance.plan, state.model, state.captured.views
    ids = {name: id(parameter) for name, parameter in model.named_parameters()}
    seen = set[int]().union(*(reached(model, one.graph) for one in graphs))
    trains = (one.graph for one in graphs if one.assumed is None or one.assumed.training is not False)
    invariant = find_invariant(model, trains)
    return (*planned.lints, *_unreached(planned, ids, seen), *_scale_invariant(planned, ids, invariant))


def _unreached(planned: Plan, ids: Mapping[str, int], seen: AbstractSet[int]) -> Iterator[Lint]:
    """Penalties on parameters that get no gradient from any output."""
    edits = [edit for edit in planned.on_parameters if edit.trainable and ids.get(edit.site) not in seen]
    for label, sites in _by_label(e for e in edits if isinstance(e.effect.definition, Penalty | OptimizerOption)):
        yield Lint(
            "unreached",
            (label,),
            sites,
            f"rule {label!r} acts on parameters that get no gradient from any output: {named(sites)}. Whatever it "
            "does there, the model's output stays the same. Use them, or leave them out with exclude=.",
        )


def _scale_invariant(planned: Plan, ids: Mapping[str, int], invariant: Mapping[int, Invariant]) -> Iterator[Lint]:
    """Norms of weights whose scale a normalization takes out."""
    edits = [edit for edit in planned.on_parameters if edit.effect.definition in NORMS and edit.trainable]
    penalized = {ids.get(edit.site, 0) for edit in edits}
    scaled = [e for e in edits if (one := invariant.get(ids.get(e.site, 0))) and one.biases <= penalized]
    for label, sites in _by_label(scaled):
        found = [invariant[ids[site]] for site in sites]
        norms = tuple(dict.fromkeys(norm for one in found for norm in one.norms))
        biases = " and biases" if any(one.biases for one in found) else ""
        yield Lint(
            "scale-invariant",
            (label,),
            sites,
            f"rule {label!r} penalizes the size of weights{biases} whose scale is taken out in train mode (by "
            f"{named(norms)}): {named(sites)}. To shrink such a weight changes no output, only the effective step "
            "size. Leave them out with exclude=, unless that is meant.",
        )


def _lint_decays(model: nn.Module, planned: Plan, optimizer: torch.optim.Optimizer) -> Iterator[Lint]:
    """Decay by an optimizer beside a rule that does the same, or beside rules that say which decay there is to be."""
    decays = {id(p): float(g.get("weight_decay") or 0) for g in optimizer.param_groups for p in g["params"]}
    decay = {name: decays.get(id(parameter), 0.0) for name, parameter in model.named_parameters()}
    edits = [edit for edit in planned.on_parameters if not edit.condition]
    asked = {edit.site: edit.label for edit in edits if isinstance(edit, LeaveToCompanion) and edit.via == "optimizer"}
    who = type(optimizer).__name__
    twice = [edit for edit in edits if decay[edit.site] and _decays(edit)]
    for label, sites in _by_label(twice):
        yield Lint(
            "double-decay",
            (label,),
            sites,
            f"rule {label!r} shrinks parameters that {who} shrinks too: {named(sites)} are under "
            f"{_shown(decay[site] for site in sites)}. Build the optimizer with weight_decay=0 for them (on the groups "
            "of fxreg.param_groups), or leave them out of the rule with exclude=.",
        )
    by_rule = {edit.site for edit in twice}
    unasked = tuple(site for site, value in decay.items() if value and site not in asked and site not in by_rule)
    if asked and unasked:
        labels = tuple(dict.fromkeys(asked.values()))
        yield Lint(
            "double-decay",
            labels,
            unasked,
            f"{who} shrinks parameters for which no rule asks: {named(unasked)} are under "
            f"{_shown(decay[site] for site in unasked)}, while the rules with via='optimizer' "
            f"({', '.join(map(repr, labels))}) say where decay is to be. Build the optimizer on the groups of "
            "fxreg.param_groups, and leave its own weight_decay at 0.",
        )


def _decays(edit: OnParameter) -> bool:
    """Whether an edit is a penalty that shrinks as weight decay does, beside the optimizer."""
    if isinstance(edit, LeaveToCompanion):
        return False
    effect = edit.effect
    return effect.definition is l2 or (effect.definition is elastic_net and effect.strengths["l2"] > 0)


def _by_label(edits: Iterable[OnParameter]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The label of every rule, and the sites of its edits."""
    found: dict[str, list[str]] = {}
    for edit in edits:
        found.setdefault(edit.label, []).append(edit.site)
    return ((label, tuple(sites)) for label, sites in found.items())


def _shown(decays: Iterable[float]) -> str:
    several = sorted({*decays})
    return f"weight_decay={several[0]:g}" + (f" to {several[-1]:g}" if len(several) > 1 else "")
