"""plan: matches → the edits to make, as frozen data that names parameters and holds no `fx.Node`."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, assert_never

import torch
from tabulate import tabulate

from .effects import Effect, Via
from .functions import FunctionPenalty
from .lints import Lint, lint_matches
from .matching import Match
from .rules import On, Op, Reduction, op_name
from .sites import ActivationSite

Emit: TypeAlias = Literal["backward", "output", "loss"]


@dataclass(frozen=True)
class _AtSite:
    """What every edit knows: the rule's label and effect, and the parameter it acts on.

    Attributes:
        condition: what must hold of the layer's position, as long as no graph was asked for it.
    """

    label: str
    effect: Effect
    site: str
    shape: torch.Size
    dtype: torch.dtype
    aliases: tuple[str, ...]
    trainable: bool
    condition: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class Penalize(_AtSite):
    """Add s·R(w) to the objective: a penalty node."""


@dataclass(frozen=True)
class PullBack(_AtSite):
    """Change the gradient on its way to the parameter: a node between the parameter and its uses."""


@dataclass(frozen=True)
class LeaveToCompanion(_AtSite):
    """Nothing in the graph: `fxreg.param_groups` or `fxreg.ProximalStep` acts."""

    via: Literal["optimizer", "proximal"]


@dataclass(frozen=True)
class PenalizeActivation:
    """Add s·R(a) to the objective for every call: a penalty node behind each, once the calls are known.

    Attributes:
        sites: the path of the module; with `op`, of every module in whose forward it is looked for.
        aliases: the other paths of the module.
        optional: whether it is fine that there is no call.
    """

    label: str
    effect: Effect
    sites: tuple[str, ...]
    on: On
    op: Op | None
    reduction: Reduction
    aliases: tuple[str, ...]
    optional: bool

    @property
    def site(self) -> str:
        """What is acted on, for people."""
        if self.op is None:
            return f"{self.on} of {self.sites[0] or 'the model'}"
        where = self.sites[0] or "the model" if len(self.sites) == 1 else f"{len(self.sites)} modules"
        return f"{self.on} of {op_name(self.op)} in {where}"


@dataclass(frozen=True)
class PenalizeFunction:
    """Add s·R(f) to the objective for every call: a penalty node that calls the captured graph itself."""

    label: str
    effect: Effect
    reduction: Reduction
    site: str = ""


OnForward: TypeAlias = PenalizeActivation | PenalizeFunction
"""What is about a forward call, and not about parameters."""
OnParameter: TypeAlias = Penalize | PullBack | LeaveToCompanion
Edit: TypeAlias = OnForward | OnParameter


@dataclass(frozen=True)
class Plan:
    """Every edit, in rule order and, within a rule, in the order of `named_parameters()`.

    `str()` is the table, and below it the lints that the rules alone show.
    """

    edits: tuple[Edit, ...]
    lints: tuple[Lint, ...] = ()

    @property
    def penalties(self) -> tuple[Penalize, ...]:
        return tuple(edit for edit in self.edits if isinstance(edit, Penalize))

    @property
    def activations(self) -> tuple[PenalizeActivation, ...]:
        return tuple(edit for edit in self.edits if isinstance(edit, PenalizeActivation))

    @property
    def functions(self) -> tuple[PenalizeFunction, ...]:
        return tuple(edit for edit in self.edits if isinstance(edit, PenalizeFunction))

    @property
    def on_forward(self) -> tuple[OnForward, ...]:
        return (*self.activations, *self.functions)

    @property
    def on_parameters(self) -> tuple[OnParameter, ...]:
        return tuple(edit for edit in self.edits if isinstance(edit, OnParameter))

    @property
    def is_open(self) -> bool:
        """Whether some edits are carried out only if their layers have a position in the graph."""
        return any(edit.condition for edit in self.on_parameters)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The parameters that a rule cuts off."""
        pulls = (edit for edit in self.edits if isinstance(edit, PullBack))
        return tuple(edit.site for edit in pulls if getattr(edit.effect.definition, "detach", False))

    @property
    def effects(self) -> dict[str, Effect]:
        """The effect of every label that acts anywhere."""
        return {edit.label: edit.effect for edit in self.edits}

    def pulls(self) -> tuple[tuple[PullBack, ...], ...]:
        """The pullbacks in the order in which gradients meet them: transforms in rule order, then the gradients of
        penalties. Those that act jointly are together, every other one is alone."""
        found: dict[object, list[PullBack]] = {}
        pulls = [edit for edit in self.edits if isinstance(edit, PullBack)]
        for pull in sorted(pulls, key=lambda pull: pull.effect.definition.default_via == "penalty"):
            together = pull.label if pull.effect.definition.is_joint else (pull.label, pull.site)
            found.setdefault(together, []).append(pull)
        return tuple(map(tuple, found.values()))

    def without_tensors(self) -> "Plan":
        """The same without the values of tensors that effects were given by name."""
        hollow = [edit.effect.without_tensors() for edit in self.edits]
        pairs = zip(self.edits, hollow, strict=True)
        return replace(self, edits=tuple(e if e.effect is own else replace(e, effect=own) for e, own in pairs))

    def companions(self, via: Via) -> tuple[LeaveToCompanion, ...]:
        return tuple(e for e in self.edits if isinstance(e, LeaveToCompanion) and e.via == via)

    def __str__(self) -> str:
        return "\n".join([self.table(), *([""] if self.lints else []), *(f"lint: {lint}" for lint in self.lints)])

    def table(self) -> str:
        """The edits, one a line."""
        if not self.edits:
            return "no rules act on this model"
        header = ("rule", "effect", "parameter", "shape", "size", "lowering", "notes")
        align = ("left", "left", "left", "left", "right", "left", "left")
        return tabulate(
            [_row(edit, bool(self.on_forward)) for edit in self.edits], header, disable_numparse=True, colalign=align
        )


def plan(matches: tuple[Match, ...]) -> Plan:
    """What the matched rules do, edit by edit."""
    return Plan(tuple(_edits(matches)), lint_matches(matches))


def _edits(matches: tuple[Match, ...]) -> Iterator[Edit]:
    for match in matches:
        activations = [site for site in match.sites if isinstance(site, ActivationSite)]
        if isinstance(match.rule.effect.definition, FunctionPenalty):
            yield PenalizeFunction(match.label, match.rule.effect, match.rule.reduction)
            continue
        together = [activations] if match.rule.op and activations else [[site] for site in activations]
        for sites in together:
            paths, aliases = tuple(site.name for site in sites), sites[0].aliases if match.rule.op is None else ()
            act = (match.rule.on, match.rule.op, match.rule.reduction, aliases, match.rule.optional)
            yield PenalizeActivation(match.label, match.rule.effect, paths, *act)
        for site in match.sites:
            if isinstance(site, ActivationSite):
                continue
            at = (match.label, match.rule.effect, site.name, site.shape, site.dtype, site.aliases, site.trainable)
            condition = "" if match.position is None else repr(match.position)
            match match.rule.lowering:
                case "penalty":
                    yield Penalize(*at, condition=condition)
                case "gradient":
                    yield PullBack(*at, condition=condition)
                case "optimizer" | "proximal" as via:
                    yield LeaveToCompanion(*at, via, condition=condition)
                case unknown:
                    assert_never(unknown)


def _row(edit: Edit, on_forward: bool) -> tuple[str, ...]:
    aliases = () if isinstance(edit, PenalizeFunction) else edit.aliases
    notes = [f"also {', '.join(aliases)}"] if aliases else []
    match edit:
        case PenalizeActivation() | PenalizeFunction():
            where = edit.site or "input of the model"
            notes += ["each call"] if edit.reduction == "sum" else [f"each call, {edit.reduction}"]
            return (edit.label, repr(edit.effect), where, "", "", "penalty", "; ".join(notes))
        case Penalize():
            lowering = "penalty"
            notes += [] if edit.trainable else ["frozen: counts in the value, gets no gradient"]
        case PullBack():
            lowering = "gradient"
            if edit.effect.definition.default_via == "penalty":
                notes.append("only where the backward pass reaches it")
            elif on_forward:
                notes.append("acts on the gradients of penalties on forward calls, too")
            notes += ["jointly with the others of its rule"] if edit.effect.definition.is_joint else []
            notes += [] if edit.trainable else ["frozen: has no gradient to act on"]
        case LeaveToCompanion():
            lowering = edit.via
            notes.append("only while it has a gradient" if edit.trainable else "frozen: left out")
        case unknown:
            assert_never(unknown)
    notes += [f"if {edit.condition}"] if edit.condition else []
    size = f"{edit.shape.numel():,}"
    shape = "×".join(map(str, edit.shape)) or "scalar"
    return (edit.label, repr(edit.effect), edit.site, shape, size, lowering, "; ".join(notes))
