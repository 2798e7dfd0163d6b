"""Noticing that rules mean something else of a model than when it was transformed.

Before each call the layout of the model is looked at. Where it changed the rules are matched again, and what they would
do now is compared with what the graph does.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from . import staleness
from .captured import Way
from .defining import not_traced
from .errors import CaptureError
from .kinds import qualified
from .layouts import Glance, Layout, Meaning, layout_of, seen
from .matching import select
from .module import CHILD, RegularizedModule, State, state_of
from .planning import OnParameter, Plan, PullBack, plan
from .resolving import narrow
from .rules import Rule
from .staleness import other_property, properties_in


def remember_meaning(gm: RegularizedModule, rules: tuple[Rule, ...]) -> None:
    """Keep what is needed to match the rules again."""
    state = state_of(gm)
    if state.provenance.plan.edits:
        state.meaning = Meaning(tuple(rule.without_tensors() for rule in rules), layout_of(state.model))


def check_meaning(gm: nn.Module) -> None:
    """Raise unless the rules mean of the model what they meant when it was transformed.

    Raises:
        CaptureError: they would act on other parameters or activations now.
    """
    if what := changed(gm):
        raise CaptureError(what)


@not_traced
def changed(gm: nn.Module) -> str | None:
    """What changed about a model so that its rules mean something else, if anything."""
    meaning = state_of(gm).meaning
    return None if meaning is None else _changed(gm, meaning, seen(meaning))


@not_traced
def difference(gm: nn.Module, way: Way) -> str | None:
    """What changed about a model since it was captured, for a way to run, or since it was transformed, if anything."""
    state = state_of(gm)
    meaning, chain = state.meaning, [one for one in state.captured.chain if one.holds_in((way,))]
    glance = seen(meaning)
    # A recording of other attributes is left aside: there is another graph for them.
    for one in chain:
        values, found = one.otherwise is None, one.passed(glance)
        if what := staleness.difference(state.model, one.remembered, gm._modules, values, found):
            return what
    if meaning is None:
        return None
    what = _changed(gm, meaning, glance)
    if what is None and meaning.glance is not None:
        for one in chain:
            one.passes(state.model, meaning.glance)
    return what


def _changed(gm: nn.Module, meaning: Meaning, glance: Glance | None) -> str | None:
    """The same as `changed`, of a model that may still look as it did."""
    state = state_of(gm)
    if meaning.properties is None:
        held = (captured for captured in state.captured.chain if captured.otherwise is None)
        remembered = (one for captured in held for one in captured.remembered)
        meaning.properties = properties_in(state.model, remembered)
    if what := other_property(meaning.properties):
        return f"the model changed since it was captured: {what}. Transform the model again."
    if glance is not None:
        return None
    what = _difference(gm, state, meaning)
    if what is None:
        meaning.glance = Glance(state.model, _roots(gm, state), meaning.asks)
        return None
    return f"the model changed since it was transformed: {what}. Transform the model again."


# What is different.


def _roots(gm: nn.Module, state: State) -> list[nn.Module]:
    """All the modules that are emitted, each with a dictionary of children of its own."""
    return [gm, *state.others, *([state.function] if state.provenance.plan.functions else [])]


def _difference(gm: nn.Module, state: State, meaning: Meaning) -> str | None:
    children = dict(state.model._modules.items())  # of a scripted model no dict
    for root in _roots(gm, state):
        own = {name: child for name, child in root._modules.items() if name != CHILD}
        for name in {**own, **children}:
            if own.get(name, ...) is not children.get(name, ...):
                return f"its module {name!r} is not the emitted module's"
    now = layout_of(state.model)
    if now == meaning.layout and not (meaning.asks and all(type(p) is nn.Parameter for p in state.model.parameters())):
        return None
    if meaning.rules is None:
        return _any_difference(state.model, meaning.layout, now)
    try:
        matches = tuple(select(state.model, meaning.rules))
        planned = plan(narrow(state.model, matches, state.captured))
    except Exception as error:
        return f"its rules cannot be matched any more ({error})"
    if what := _difference_of(state, planned, _Then(state.model, meaning.layout, now)):
        return what
    meaning.layout = now
    return None


class _Then:
    """A model, and its layouts before and now."""

    def __init__(self, model: nn.Module, before: Layout, now: Layout) -> None:
        self.model, self.before, self.now = model, before, now

    def what_became_of(self, name: str) -> str:
        """What happened to what has, or had, a parameter's name."""
        if name not in self.before.parameters:
            return f"{name!r} is new"
        if name not in self.now.parameters:
            return f"{name!r} is {self._in_place_of(name)} now"
        (then, before), (first, shape) = self.before.parameters[name], self.now.parameters[name]
        if first != then:
            one = f"no longer one with {then!r}" if first == name else f"one with {first!r} now"
            return f"{name!r} is {one}"
        if shape != before:
            return f"{name!r} has the shape {tuple(shape)} now, and had {tuple(before)}"
        path = name.rpartition(".")[0]
        _, kind = self.now.modules[path]
        if kind != self.before.modules[path][1]:
            return f"{name!r} belongs to a {kind.rpartition('.')[2]} now"
        return f"of {name!r} the rules say something else now"

    def _in_place_of(self, name: str) -> str:
        path, _, key = name.rpartition(".")
        owner: Any = self.model
        for part in path.split(".") if path else ():
            owner = owner._modules.get(part) if owner is not None else None
        if owner is None:
            return "gone, with its module,"
        if parametrize.is_parametrized(owner, key):
            return "computed by a parametrization"
        value = getattr(owner, key, None)
        return "a buffer" if key in owner._buffers else "gone" if value is None else f"a plain {type(value).__name__}"


def _difference_of(state: State, planned: Plan, then: _Then) -> str | None:
    """What a new plan does to other parameters or activations than the one that was carried out, if anything."""
    was = state.provenance.plan
    before, now = ([(e.label, getattr(e, "sites", ()), e.site) for e in one.on_forward] for one in (was, planned))
    for label, _, site in (place for place in (*before, *now) if place not in before or place not in now):
        return f"rule {label!r} is not on the same activations any more, the {site} among them"
    parameters = dict(state.model.named_parameters(remove_duplicate=False))
    done, means = {}, {}
    for edit in was.on_parameters:
        parameter = parameters.get(edit.site)
        if (edit.label, id(parameter)) in done:
            return f"{then.what_became_of(edit.site)}, and rule {edit.label!r} acts there"
        done[edit.label, id(parameter)] = edit
    for edit in planned.on_parameters:
        means[edit.label, id(parameters[edit.site])] = edit
        problem = _problem(edit, then)
        if problem or (edit.label, id(parameters[edit.site])) not in done:
            return f"{problem or then.what_became_of(edit.site)}, and rule {edit.label!r} would act there"
    for place, edit in done.items():
        if place not in means:
            return f"{then.what_became_of(edit.site)}, and rule {edit.label!r} acts there"
        names, others = {edit.site, *edit.aliases}, {means[place].site, *means[place].aliases}
        if isinstance(edit, PullBack) and names != others:  # each name has a stand-in
            return f"{then.what_became_of(min(names ^ others))}, and rule {edit.label!r} acts there"
    return None


def _problem(edit: OnParameter, then: _Then) -> str | None:
    """Why an effect would not fit a parameter of another shape."""
    shape = then.now.parameters[edit.site][1]
    _, before = then.before.parameters.get(edit.site, (None, shape))
    definition = edit.effect.definition
    if shape == before or not (definition.anchors or definition.misfit(edit.effect, shape, edit.dtype)):
        return None
    return then.what_became_of(edit.site)


def _any_difference(model: nn.Module, before: Layout, now: Layout) -> str | None:
    """What is different at all, but for classes that are subclasses of what they were."""
    then = _Then(model, before, now)
    for name in _differing(before.parameters, now.parameters):
        return then.what_became_of(name)
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    for path in _differing(before.modules, now.modules):
        kinds = {qualified(cls) for cls in type(modules[path]).__mro__} if path in modules else set()
        is_stand_in = not path and type(model) is nn.Module  # unpickled: what is left of a class that has no name
        same = path in before.modules and path in modules and before.modules[path][0] == now.modules[path][0]
        if not (same and (is_stand_in or before.modules[path][1] in kinds)):
            return f"its module {path!r} is another one"
    return None


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    return (name for name in {**before, **now} if before.get(name) != now.get(name))
