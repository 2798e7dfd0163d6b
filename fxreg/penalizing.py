"""Writing penalties on activations into a graph: behind the calls that it shows, and into those that it does not."""

import difflib
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from . import calls, penalty_calls
from .defining import NAMESPACE
from .errors import MatchError
from .hidden_uses import reached
from .inserting import Insertion
from .layers import is_plain_layer
from .locating import Places, Spot, says_it_writes
from .matching import nearest
from .module import CHILD
from .planning import PenalizeActivation, Plan
from .rules import op_name
from .side_channels import has_hooks
from .torch_calls import call_name, written


def penalize_activations(into: Insertion) -> list[fx.Node]:
    """Put a penalty where activations pass, and take the marks away; returns the penalties."""
    terms = _where_they_pass(into) if into.plan.activations else []
    for node in into.graph.nodes:
        if node.target is calls.passes:
            into.graph.erase_node(node)
    return terms


def _where_they_pass(into: Insertion) -> list[fx.Node]:
    places = Places(into.model, into.graph)
    terms, inside = list[fx.Node](), dict[fx.Node, list[tuple[PenalizeActivation, str]]]()
    penalized: dict[tuple[fx.Node, str], list[PenalizeActivation]] = {}
    for edit in into.plan.activations:
        found = into.calls.setdefault(edit.label, [])
        for spot in [*places.spots(edit)]:
            if edit.op is not None:
                call = spot.values[0] if edit.on == "output" else spot.before
                _check_once(edit, call, penalized.setdefault((call, edit.on), []))
            with into.graph.inserting_before(spot.before):
                terms.append(_at(into, places, edit, spot))
            found.append(terms[-1].name)
        for node, path in places.regions(edit):
            inside.setdefault(node, []).append((edit, path))
    for node, watched in inside.items():
        terms += _inside(into, node, watched)
    return terms


def penalize_functions(into: Insertion) -> list[fx.Node]:
    """Penalties whose nodes call the captured graph itself, at its end."""
    places = [node for node in into.graph.nodes if node.op == "placeholder"]
    terms = []
    for which, edit in enumerate(into.plan.functions):
        stream = into.stream(edit) if edit.effect.definition.has_stream else None
        with into.graph.inserting_before(into.output):
            state = into.insert(edit.label, "get_attr", CHILD)
            strengths, named = into.tensors(edit.label, edit.effect), dict(edit.effect.arguments)
            args = (state, which, places, strengths, stream, named, into.emit != "backward")
            terms.append(
                into.insert(edit.label, "call_function", penalty_calls.penalize_function, args, name=edit.label)
            )
    return terms


def unseen(into: Insertion) -> str | None:
    """Why this graph cannot be given what the rules on forward calls ask for, if it cannot."""
    doing_more = _doing_more(into) if into.plan.functions else {}
    for path, reason in doing_more.items():
        return (
            f"rule {into.plan.functions[0].label!r} calls the captured graph a second time, and in it "
            f"{path or 'the model itself'} runs as it is ({reason}): what it does beside its values would be done "
            "twice. Pass example_inputs= so that more can be captured, or penalize by hand."
        )
    if into.plan.functions and (argument := _written_argument(into)):
        return (
            f"rule {into.plan.functions[0].label!r} is about the model's input, and the forward writes into its "
            f"argument {argument!r}. Let it write into a copy."
        )
    on_modules = [(edit, path) for edit in into.plan.activations if edit.op is None for path in edit.sites]
    hidden = _hidden(into) if on_modules else {}
    for edit, path in on_modules:
        if path in hidden:
            return (
                f"rule {edit.label!r} ({edit.site}): {hidden[path]}, where its calls are not seen. Leave it out with "
                f"exclude={path!r}."
            )
    on_calls = [(edit, edit.op) for edit in into.plan.activations if edit.op is not None]
    places = Places(into.model, into.graph) if on_calls else None
    for edit, op in on_calls:
        for node, inner in places.regions(edit) if places else ():
            path = "" if node.op != "call_module" else str(node.target)
            where = ".".join(filter(None, (path, inner)))
            return (
                f"rule {edit.label!r} looks for calls of {op_name(op)} in the forward of {where or 'the model'!r}"
                f", which the graph does not show: {path or 'the model itself'} is called as a whole "
                f"({into.opaque.get(path, 'a layer of its own')}). Narrow the rule with name=, layer= or "
                f"exclude={where!r}, or pass example_inputs= so that more can be seen."
            )
    return None


def _written_argument(into: Insertion) -> str | None:
    """An argument that the forward may write into; torch's own layers do so only where they say it."""
    for node in into.graph.nodes:
        for one in written(node) if says_it_writes(into.model, node) else ():
            if one.op == "placeholder":
                return str(one.target)
    return None


def _doing_more(into: Insertion) -> dict[str, str]:
    """The paths of the modules that are called as a whole, in which something of the user's runs, with why."""
    called = {str(node.target): "it has hooks" for node in into.graph.nodes if node.op == "call_module"}
    hooked = {p: why for p, why in called.items() if any(map(has_hooks, into.model.get_submodule(p).modules()))}
    return {p: why for p, why in into.opaque.items() if not is_plain_layer(into.model.get_submodule(p))} | hooked


def _hidden(into: Insertion) -> dict[str, str]:
    """The paths of the modules that may be called where no hook tells of it, with where that is."""
    found: dict[str, str] = {}
    paths = {module: path for path, module in into.model.named_modules()}
    for module, path in paths.items():
        if isinstance(module, torch.jit.ScriptModule):
            inside = (paths[one] for one in module.modules() if one is not module)
            found |= dict.fromkeys(inside, f"it is inside {path or 'the model'}, which is scripted")
    for path, reason in into.opaque.items() if "" not in into.opaque else ():
        region = into.model.get_submodule(path)
        others = (reached(region) - {*region.modules()}) & paths.keys()
        why = f"{path}, which runs as it is ({reason}), reaches it past its registered modules"
        found |= dict.fromkeys((paths[one] for one in others), why)
    return found


def check_called(plan: Plan, insertions: Sequence[Insertion]) -> None:
    """Raise a MatchError for a rule on activations that no graph has a penalty of."""
    for edit in plan.activations:
        if not edit.optional and not any(one.calls.get(edit.label) for one in insertions):
            what, near = "the modules it matches", ""
            if edit.op is not None:
                what, near = op_name(edit.op), _nearest_calls(op_name(edit.op), insertions)
            raise MatchError(
                f"rule {edit.label!r} ({edit.site}): the forward makes no call of {what}{near}. Mend op=, name= or "
                "layer=, or pass optional=True."
            )


def _nearest_calls(wanted: str, insertions: Sequence[Insertion]) -> str:
    """The names of calls that the forward does make, as `op=` takes them."""
    nodes = [node for one in insertions for node in one.graph.nodes if node.name not in one.nodes]
    full = [call_name(node.op, node.target) for node in nodes if node.op in ("call_function", "call_method")]
    by_name = {name.rpartition(".")[2]: name for name in full if not name.startswith("fxreg.")}
    return nearest([by_name[name] for name in difflib.get_close_matches(wanted, by_name, n=3, cutoff=0)], "calls")


def _check_once(edit: PenalizeActivation, call: fx.Node, others: list[PenalizeActivation]) -> None:
    """Raise for a call that another rule puts the same on, which says otherwise what is called."""
    for other in others:
        if other.effect.same_but_strength(edit.effect):
            raise MatchError(
                f"rules {other.label!r} and {edit.label!r} are duplicates: both put {edit.effect.name} on the "
                f"{edit.on} of a call of {call_name(call.op, call.target)}. Drop one, or keep them apart with name=."
            )
    others.append(edit)


def _at(into: Insertion, places: Places, edit: PenalizeActivation, spot: Spot) -> fx.Node:
    """A penalty on what passes at a spot."""
    target: Any = "clone" if spot.is_tensor else penalty_calls.copied
    kind = "call_method" if spot.is_tensor else "call_function"
    values = [
        into.insert(edit.label, kind, target, (value,)) if places.is_written_later(spot, value) else value
        for value in spot.values
    ]
    if not spot.is_tensor:
        return into.insert(
            edit.label, "call_function", penalty_calls.penalize, (values, *_described(into, edit)), name=edit.label
        )
    target, strengths, kwargs = into.formula(edit)
    name = f"{spot.values[0].name}_{edit.label}"
    term = into.insert(edit.label, "call_function", target, (values[0], *strengths), kwargs, name)
    if edit.reduction == "sum":
        return term
    args = (term, values[0], edit.reduction)
    return into.insert(edit.label, "call_function", penalty_calls.reduced, args, name=f"{name}_{edit.reduction}")


def _described(into: Insertion, edit: PenalizeActivation) -> tuple[Any, ...]:
    """What `penalty_calls.penalize` is told of a penalty."""
    target, strengths, kwargs = into.formula(edit)
    name = target.name().removeprefix(f"{NAMESPACE}::")
    return name, strengths, kwargs, edit.reduction, f"rule {edit.label!r}, {edit.site}"


def _inside(into: Insertion, node: fx.Node, watched: list[tuple[PenalizeActivation, str]]) -> list[fx.Node]:
    """Penalties on what passes inside a module that is called as a whole."""
    with into.graph.inserting_before(node):
        told = [(path, edit.on, *_described(into, edit)) for edit, path in watched]
        if node.op == "call_module":
            target: Any = penalty_calls.call_penalized
            args: Any = (into.insert("", "get_attr", str(node.target)), told, {}, node.args, dict(node.kwargs))
        else:
            target, args = penalty_calls.call_model_penalized, (node.args[0], told, *node.args[1:])
        called = into.insert("", "call_function", target, args, name=f"{node.name}_penalized")
        result = into.insert("", "call_function", operator.getitem, (called, 0), name=node.name)
        found = into.insert("", "call_function", operator.getitem, (called, 1))
        terms = [
            into.insert(edit.label, "call_function", operator.getitem, (found, i), name=edit.label)
            for i, (edit, _) in enumerate(watched)
        ]
    node.replace_all_uses_with(result)
    into.graph.erase_node(node)
    for (edit, _), term in zip(watched, terms, strict=True):
        into.calls[edit.label].append(term.name)
    return terms
