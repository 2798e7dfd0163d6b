"""match: (module, rules) → the sites each rule acts on. Reads the module, changes nothing, captures nothing."""

import difflib
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from .anchoring import check_anchors
from .classes import Layer, is_known, is_of
from .effects import Effect, strength_name
from .errors import MatchError, RuleError
from .functions import FunctionPenalty
from .kinds import Kind, kinds
from .layers import is_layer
from .positions import Position
from .rules import Rule, is_literal, matcher
from .sites import ActivationSite, AnySite, Owner, Site, check_paths, find_activation_sites, find_sites


@dataclass(frozen=True)
class Match:
    """A rule under its label, and every site it acts on, in the order of `named_parameters()` or `named_modules()`.

    Where the rule asks for a position in the graph, it acts only on the sites that turn out to have it.

    Attributes:
        names: what its `exclude` was asked of: every name of a parameter, or for activations of a module.
    """

    label: str
    rule: Rule
    sites: tuple[AnySite, ...]
    position: Position | None = None
    names: Collection[str] = field(default=(), repr=False, compare=False)


def match(model: nn.Module, rules: tuple[Rule, ...]) -> tuple[Match, ...]:
    """Resolve every rule on the module, all but positions in the graph. What effects mean is what they mean now.

    Raises:
        RuleError: a class name found neither in `torch.nn` nor in the model; a `where` that fails.
        MatchError: a rule that matches nothing, a duplicate, two rules of one label, a penalty on a frozen site.
        CaptureError: a model that is inside itself.
    """
    for definition in {rule.effect.definition for rule in rules}:
        definition.refresh()
    found = []
    for one in select(model, rules):
        _check(model, one)
        found.append(one)
    _check_conflicts(found)
    return tuple(found)


def select(model: nn.Module, rules: tuple[Rule, ...]) -> Iterator[Match]:
    """What every rule selects; whether its effect can act there is not asked.

    Raises:
        CaptureError: a model that is inside itself.
        RuleError, MatchError: a class name that is unknown, a `where` that fails, labels, an undecided class.
    """
    check_paths(model)
    found_kinds = kinds(model)
    sites = tuple(find_sites(model, found_kinds))
    owned = _by_owner(sites)
    parameters = {name for site in sites for name in site.names}
    classes = {base for kind in {*found_kinds.values()} for cls in kind.classes for base in cls.__mro__}
    unloaded = [kind.name for kind in found_kinds.values() if kind.name and not kind.classes]
    is_asked_for = functools.cache(is_of)
    for label, rule in zip(_labels(rules), rules, strict=True):
        for key, layers in (("layer", rule.layers), ("where", rule.position.layers if rule.position else ())):
            for layer in layers:
                if isinstance(layer, str) and not is_known(layer, classes, unloaded):
                    near = difflib.get_close_matches(layer, sorted({c.__name__ for c in classes}), n=3)
                    raise RuleError(
                        f"rule {label!r}: {key}={layer!r} names a class that is neither in torch.nn nor in the model"
                        f"{nearest(near)}. Mend {key}=."
                    )
        chosen: tuple[AnySite, ...]
        if rule.on == "param":
            chosen = tuple(_selected(rule, label, sites, owned, is_asked_for))
        else:
            chosen = tuple(_selected_activations(rule, label, find_activation_sites(model, found_kinds, rule)))
        yield Match(label, rule, chosen, rule.position, parameters if rule.on == "param" else found_kinds.keys())


def decided(model: nn.Module, matches: Sequence[Match]) -> tuple[Match, ...]:
    """Matches whose positions are known now, checked like all others.

    Raises:
        RuleError, MatchError: as `match`.
    """
    found = [replace(match, position=None) for match in matches]
    for before, match in zip(matches, found, strict=True):
        if before.position is not None:
            _check(model, match)
    _check_conflicts(found)
    return tuple(found)


def _check(model: nn.Module, match: Match) -> None:
    """Raise unless a rule has its sites, and its effect fits them; whether it does is not asked while they are open."""
    label, rule = match.label, match.rule
    if not match.sites and not rule.optional:
        raise MatchError(_matched_nothing(label, rule, model))
    if rule.on == "param" and match.position is None:
        parameters = tuple(site for site in match.sites if isinstance(site, Site))
        _check_takes(label, rule.effect, parameters)
        check_anchors(label, rule.effect, parameters, model)


def _by_owner(sites: tuple[Site, ...]) -> dict[str, list[int]]:
    """Where the sites of each owner's path stand."""
    owned: dict[str, list[int]] = {}
    for position, site in enumerate(sites):
        for path in dict.fromkeys(owner.path for owner in site.owners):
            owned.setdefault(path, []).append(position)
    return owned


def _selected(
    rule: Rule,
    label: str,
    sites: tuple[Site, ...],
    owned: Mapping[str, Sequence[int]],
    is_asked_for: Callable[[tuple[Layer, ...], Kind], bool | None],
) -> Iterator[Site]:
    """The sites that a rule acts on, in order."""
    param, excluded = matcher(rule.param), [matcher(pattern) for pattern in rule.exclude]
    paths: Collection[str] = owned
    if rule.name is not None:
        paths = {str(rule.name)} & owned.keys() if is_literal(rule.name) else {*filter(matcher(rule.name), owned)}
        sites = tuple(sites[position] for position in sorted({i for path in paths for i in owned[path]}))

    def selects(owner: Owner) -> bool | None:
        named = owner.path in paths and (param(owner.key) or param(owner.key.rpartition(".")[2]))
        return is_asked_for(rule.layers, owner.kind) if named else False

    for site in sites:
        chosen = [*map(selects, site.owners)]
        if (not any(chosen) and None not in chosen) or any(one(name) for one in excluded for name in site.names):
            continue
        if not any(chosen):
            raise MatchError(_undecided(label, rule, site.owners[chosen.index(None)]))
        if rule.position is not None:  # asked of the owners by which the rule selects the site
            yield replace(site, owners=tuple(itertools.compress(site.owners, chosen)))
        elif _wanted(rule, label, site):
            yield site


def _selected_activations(rule: Rule, label: str, sites: Iterable[ActivationSite]) -> Iterator[ActivationSite]:
    """The modules whose activations a rule acts on, or in whose forwards it looks for calls, in order."""
    about_all = isinstance(rule.effect.definition, FunctionPenalty)
    named = matcher("" if about_all else "*" if rule.name is None else rule.name)
    excluded = [matcher(pattern) for pattern in rule.exclude]
    for site in sites:
        if rule.op is not None and (is_layer(site.layer) or type(site.layer) is nn.Sequential):
            continue  # nobody means the calls in torch's own forwards
        is_chosen = any(map(named, site.names)) and any(is_of(rule.layers, kind) for kind in site.kinds)
        if is_chosen and not any(one(name) for one in excluded for name in site.names) and _wanted(rule, label, site):
            yield site


def _wanted(rule: Rule, label: str, site: AnySite) -> bool:
    try:
        return rule.where is None or isinstance(rule.where, Position) or bool(rule.where(site))
    except Exception as error:
        raise RuleError(f"rule {label!r}: where= failed at {site.name!r}: {type(error).__name__}: {error}") from error


def _labels(rules: tuple[Rule, ...]) -> tuple[str, ...]:
    given = Counter(rule.label for rule in rules if rule.label is not None)
    for label, count in given.items():
        if count > 1:
            raise MatchError(f"label {label!r} is given to {count} rules; labels must be unique.")
    taken, labels = set(given), []
    counts = Counter[str]()
    for rule in rules:
        name = rule.effect.name
        label = rule.label or name
        while rule.label is None and label in taken:
            counts[name] += 1
            label = f"{name}_{counts[name] + 1}"
        taken.add(label)
        labels.append(label)
    names = Counter(
        strength_name(label, r.effect, own)
        for label, r in zip(labels, rules, strict=True)
        for own in r.effect.strengths
    )
    for name, count in names.items():
        if count > 1:
            raise MatchError(f"two rules would share the strength {name!r}; give one of them another label.")
    return tuple(labels)


def _check_takes(label: str, effect: Effect, sites: tuple[Site, ...]) -> None:
    """Raise where an effect does not fit."""
    alike: dict[tuple[object, ...], Site] = {}
    for site in sites:
        alike.setdefault((site.shape, site.dtype), site)
    for site in alike.values():
        if not site.dtype.is_floating_point:
            what = "complex" if site.dtype.is_complex else "not a floating-point tensor"
            raise MatchError(
                f"rule {label!r}: {effect.name} cannot act on {site.name!r}: it is {what} ({site.dtype}). "
                f"Leave it out with exclude={site.name!r}."
            )
        if problem := effect.definition.misfit(effect, site.shape, site.dtype):
            raise RuleError(
                f"rule {label!r}: {effect!r} does not fit {site.name!r} of shape {tuple(site.shape)}: {problem}. "
                "Mend the effect's arguments, or narrow the rule."
            )


def _check_conflicts(found: Iterable[Match]) -> None:
    seen: dict[AnySite | str, list[Match]] = {}
    for later in (match for match in found if match.position is None):
        for site in later.sites:
            place = site.name if isinstance(site, Site) else site
            for earlier in seen.setdefault(place, []):
                _check_pair(earlier, later, site)
            seen[place].append(later)


def _check_pair(earlier: Match, later: Match, site: AnySite) -> None:
    first, second = earlier.rule.effect, later.rule.effect
    if first.same_but_strength(second):
        raise MatchError(
            f"rules {earlier.label!r} and {later.label!r} are duplicates: both put {first.name} on {site.name!r}. "
            "Drop one, or keep them apart with exclude=."
        )
    kinds = {bool(getattr(e.definition, "detach", False)): e for e in (first, second)}
    if len(kinds) == 2 and kinds[False].definition.default_via != "gradient":
        raise MatchError(
            f"rules {earlier.label!r} and {later.label!r} contradict each other: {site.name!r} is frozen by one and "
            f"under {kinds[False].name} in the other. Keep them apart with exclude=."
        )


def _undecided(label: str, rule: Rule, owner: Owner) -> str:
    """What to say where a graph does not tell the class of a parameter's owner, and the rule asks for one."""
    asked = ", ".join(repr(one) if isinstance(one, str) else one.__name__ for one in rule.layers)
    if owner.kind.name:
        why = f"was a {owner.kind.name}, which is not loaded, so its base classes are unknown. Import it"
    else:
        why = "did not run by itself when the graph was made, so its class is unknown. Transform the model itself"
    return (
        f"rule {label!r} asks for layer={asked}, but of the owner of {owner.full_name!r} only a graph is left: "
        f"{owner.path!r} {why}, leave it out with exclude={owner.full_name!r}, or select it by name= without layer=."
    )


def _matched_nothing(label: str, rule: Rule, model: nn.Module) -> str:
    conditions = f" ({', '.join(rule.conditions())})" if rule.conditions() else ""
    near, found_kinds = "", {*kinds(model).values()}
    has_layer = any(is_of(rule.layers, kind) for kind in found_kinds)
    if not has_layer:
        asked = ", ".join(one if isinstance(one, str) else one.__name__ for one in rule.layers)
        near = _nearest(asked, "layers", {cls.__name__ for kind in found_kinds for cls in kind.classes})
    if has_layer or rule.name is not None or rule.param != "*":
        is_module = rule.on != "param" or rule.name is not None
        paths = [path for path, _ in (model.named_modules() if is_module else model.named_parameters()) if path]
        near += _nearest(str(rule.name or rule.param).strip("*"), "modules" if is_module else "parameters", paths)
    keys = "layer=, name=, param=, exclude= or where=" if rule.on == "param" else "layer=, name=, exclude= or where="
    return (
        f"rule {label!r}{conditions} matched no {'parameter' if rule.on == 'param' else 'module'}"
        f"{near}. {_divided(rule, model)}Mend {keys}, or pass optional=True."
    )


def _divided(rule: Rule, model: nn.Module) -> str:
    """What to say where a key has full names of parameters, which takes two keys."""
    full = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    parts = {"name": [path for path, _ in model.named_modules()], "param": [one.rpartition(".")[2] for one in full]}
    for key, own in parts.items() if rule.on == "param" else ():
        pattern = getattr(rule, key)
        wants = matcher(pattern) if pattern is not None else None
        if wants is not None and not any(map(wants, own)) and any(map(wants, full)):
            path, _, name = next(filter(wants, full)).rpartition(".")
            return (
                f"{key}={pattern!r} has full names of parameters. Give the module's path and the parameter's own "
                f"name apart, as in name={path!r}, param={name!r}. "
            )
    return ""


def _nearest(wanted: str, what: str, candidates: Iterable[str]) -> str:
    return nearest(difflib.get_close_matches(wanted, sorted(candidates), n=3, cutoff=0), what)


def nearest(names: list[str], what: str = "names") -> str:
    """The end of an error's first sentence: what might have been meant."""
    return f"; nearest {what}: {', '.join(map(repr, names))}" if names else ""
