"""What people read: the plan before, the provenance after, and the difference in code."""

import difflib
from dataclasses import dataclass
from typing import overload

from torch import fx, nn
from torch.export import ExportedProgram

from .errors import FxregError, RuleError
from .exported import as_module
from .files import Rules, given_rules
from .linting import lint_emitted
from .lints import Lint
from .matching import match
from .module import Provenance, emitted, is_emitted, state_of
from .planning import LeaveToCompanion, Plan, plan
from .transforming import strip

_COMPANIONS = {
    "optimizer": "call fxreg.param_groups and build the optimizer on it",
    "proximal": "call fxreg.ProximalStep(optimizer, gm)",
}


@dataclass(frozen=True)
class Report:
    """What was emitted. `str()` is the table and what goes with it.

    Attributes:
        plan: the edits that were made.
        emit: where the total penalty goes.
        opaque: for the path of every module called as a whole, why; `""` is the root.
        islands: the graphs of modules inside these, by path: captured by themselves, verified, and with no rules in
            them. They do not run: what is called as a whole runs as it is.
        verified: whether the result was compared with the model.
        calls: for the label of every rule on activations, the nodes of its penalties in the graph; what is called as a
            whole and may have several inside is one.
        unbound: the labels of rules whose companion call (`fxreg.param_groups`, `fxreg.ProximalStep`) has not come
            yet.
        lints: what is seldom meant: of the rules, and of where in the graph they act.
    """

    plan: Plan
    emit: str
    opaque: dict[str, str]
    islands: dict[str, fx.GraphModule]
    verified: bool
    unbound: tuple[str, ...]
    calls: dict[str, tuple[str, ...]]
    lints: tuple[Lint, ...]

    def __str__(self) -> str:
        lines = [self.plan.table(), "", f"emit: {self.emit}"]
        vias = {edit.label: edit.via for edit in self.plan.edits if isinstance(edit, LeaveToCompanion)}
        lines += [f"unbound: {label}: {_COMPANIONS[vias[label]]}" for label in self.unbound]
        lines += [f"activations: {label}: {', '.join(nodes) or 'no call'}" for label, nodes in self.calls.items()]
        lines += [f"opaque: {path or 'the model itself'}: {reason}" for path, reason in self.opaque.items()]
        lines += [f"island: {path}: a graph of {len(gm.graph.nodes)} nodes" for path, gm in self.islands.items()]
        lines += [f"lint: {lint}" for lint in self.lints]
        lines.append("verified against the model" if self.verified else "not verified: no example_inputs were given")
        return "\n".join(lines)


@overload
def explain(model: nn.Module) -> Report: ...
@overload
def explain(model: nn.Module | ExportedProgram, rules: Rules) -> Plan: ...
def explain(model: nn.Module | ExportedProgram, rules: Rules | None = None) -> Plan | Report:
    """Say what rules would do to a model, or what was done to an emitted module. Captures and changes nothing.

    Args:
        model: with rules, any model or exported program; without, what `fxreg.transform` returned.
        rules: the rules to try, or the path of a file with them.

    Returns:
        With rules the `Plan`: every site, its rule, size, strength and lowering. Without, the `Report`: the plan that
        was carried out, what stayed opaque and why, whether it was verified, and which rules still wait for their
        optimizer. Both print as tables.

    Raises:
        RuleError, MatchError: as `fxreg.transform`.
        FxregError: no rules, and not a module that `fxreg.transform` returned.

    >>> import torch, fxreg
    >>> print(fxreg.explain(torch.nn.Linear(4, 2), [fxreg.Rule(fxreg.l1(0.1), param="weight")]))
    rule    effect    parameter    shape      size  lowering    notes
    ------  --------  -----------  -------  ------  ----------  -------
    l1      l1(0.1)   weight       2×4           8  penalty
    """
    if not isinstance(model, nn.Module | ExportedProgram):
        raise FxregError(f"explain: model must be an nn.Module or an ExportedProgram, got {model!r}.")
    model = as_module(model)
    if rules is not None:
        if is_emitted(model):
            raise RuleError("explain(gm) takes no rules: they are in the module. For a dry run, pass the model.")
        return plan(match(model, given_rules(rules)))
    state = state_of(model)
    provenance = state.provenance
    return Report(
        plan=provenance.plan,
        emit=provenance.emit,
        opaque=dict(state.captured.opaque),
        islands=dict(state.islands),
        verified=provenance.verified,
        unbound=tuple(state.unbound()),
        lints=lint_emitted(state),
        calls={label: tuple(nodes) for label, nodes in provenance.calls.items()},
    )


def diff(gm: nn.Module) -> str:
    """The emitted code against the unregularized code, each inserted line with the labels of the rules that it serves.

    Raises:
        FxregError: not a module that `fxreg.transform` returned.

    >>> import torch, fxreg
    >>> gm = fxreg.transform(torch.nn.Linear(4, 2), [fxreg.Rule(fxreg.l1(0.1), param="weight")])
    >>> print(fxreg.diff(gm).splitlines()[0])
    --- unregularized
    """
    served = _served(emitted(gm).graph, state_of(gm).provenance)
    before = str(strip(gm).code).strip().splitlines()
    after = str(emitted(gm).code).strip().splitlines()
    lines = []
    for line in difflib.unified_diff(before, after, "unregularized", "regularized", lineterm="", n=2):
        labels = served.get(line[1:].partition("=")[0].strip(), []) if line.startswith("+ ") else []
        rules = f"  # rule{'s' * (len(labels) > 1)} {', '.join(map(repr, labels))}"
        lines.append(f"{line}{rules}" if labels else line)
    return "\n".join(lines)


def _served(graph: fx.Graph, provenance: Provenance) -> dict[str, list[str]]:
    """For every node's name, the rules that it serves: its own; or else, in their order, those whose nodes it takes; or
    if there are none, for what was inserted, those of its users."""
    order = dict.fromkeys(edit.label for edit in provenance.plan.edits)
    found: dict[str, set[str]] = {}
    for node in graph.nodes:
        inserted = [one.name for one in node.all_input_nodes if one.name in provenance.nodes]
        own = provenance.nodes.get(node.name)
        found[node.name] = {own} if own else set().union(*map(found.__getitem__, inserted))
    for node in reversed(graph.nodes):
        if node.name in provenance.nodes and not found[node.name]:
            found[node.name] = set().union(*(found[user.name] for user in node.users))
    return {name: [label for label in order if label in labels] for name, labels in found.items()}
