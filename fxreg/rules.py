"""What a rule says: an effect, what it selects, and how it is lowered. Checked when it is constructed."""

import copy
import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from .classes import Layer, checked_layers, is_dotted, several
from .effects import Definition, Effect, Via
from .errors import RuleError
from .functions import FunctionPenalty
from .positions import Position

if TYPE_CHECKING:
    from .sites import AnySite

Pattern: TypeAlias = str | re.Pattern[str]
Op: TypeAlias = Callable[..., Any] | str
On: TypeAlias = Literal["param", "output", "input"]
Reduction: TypeAlias = Literal["sum", "mean", "batch"]

_REGEX = "re:"
_FLAGS = {"a": re.ASCII, "i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "x": re.VERBOSE}
_WILDCARDS = frozenset("*?[")


@dataclass(frozen=True, kw_only=True)
class _Keys:
    """The fields of a rule that select sites; all given ones must hold."""

    layer: Layer | tuple[Layer, ...] | None = None
    op: Op | None = None
    name: str | None = None
    param: str = "*"
    exclude: tuple[str, ...] = ()
    where: "Callable[[AnySite], object] | Position | None" = None
    on: On = "param"
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class _Acts:
    """The fields of a rule that say what happens at its sites."""

    via: Via | None = None
    reduction: Reduction = "sum"
    label: str | None = None


@dataclass(frozen=True, init=False, repr=False)
class Rule(_Acts, _Keys):
    """One effect on everything it selects.

    Args:
        effect: what to do: `fxreg.l1(1e-4)`, `fxreg.clip_norm(1.0)`, ….
        layer: a module class, a class name (`"Linear"`, `"nn.Linear"`), or a tuple of them: the module is an instance,
            subclasses included. It is the one that directly owns the parameter; for activations, the one that is
            called, or with `op` the one in whose forward the call stands.
        op: for activations of calls that are not modules: a function or method (`torch.relu`, `torch.Tensor.relu`), or
            the name that functions and methods share (`"relu"`).
        name: that module's dotted path: a glob in which `*` crosses dots, a compiled pattern (full match), or `"re:…"`.
        param: the parameter's key inside its owner, likewise. The default selects every parameter, biases included.
        exclude: patterns on the parameter's full dotted name, or for activations on the module's path; what any of
            them matches is left out.
        where: a last predicate on the site; or for parameters a position of the layer in the graph, decided when the
            model is captured: `fxreg.before(…)`, `after(…)`, `last()`, and what `&`, `|` and `~` make of them.
        on: `"param"`, or what a penalty is put on instead: every floating-point tensor in the `"output"`, or among
            the arguments (`"input"`), of every call.
        via: the lowering; by default the effect's first one.
        reduction: for activations: `"sum"` is s·R(a) for each call, `"batch"` divides it by the size of a's first
            dimension (as Keras does), and `"mean"` by the number of a's elements.
        label: the rule's name in reports, strengths and graph nodes; by default the effect's name, made unique.
        optional: whether matching nothing is fine.

    Raises:
        RuleError: an argument of the wrong kind, a pattern that does not compile, a `via` the effect does not have.

    >>> import fxreg
    >>> fxreg.Rule(fxreg.l1(1e-4), layer="Conv2d", param="weight", label="sparse")
    Rule(l1(0.0001), layer='Conv2d', param='weight', label='sparse')
    >>> fxreg.Rule(fxreg.l1(1e-4), op="relu", name="encoder.*", on="output", reduction="batch")
    Rule(l1(0.0001), op='relu', name='encoder.*', on='output', reduction='batch')
    """

    effect: Effect

    def __init__(
        self,
        effect: Effect,
        *,
        layer: Layer | Iterable[Layer] | None = None,
        op: Op | None = None,
        name: Pattern | None = None,
        param: Pattern = "*",
        exclude: Pattern | Iterable[Pattern] = (),
        where: "Callable[[AnySite], object] | Position | None" = None,
        on: On = "param",
        via: Via | None = None,
        reduction: Reduction = "sum",
        label: str | None = None,
        optional: bool = False,
    ) -> None:
        who = f"rule {label!r}" if label is not None else "rule"
        if isinstance(effect, Definition):
            raise RuleError(f"{who}: effect={effect!r} lacks its strength; call it: fxreg.{effect.name}(…).")
        if not isinstance(effect, Effect):
            raise RuleError(f"{who}: effect must be an effect such as fxreg.l1(1e-4), got {effect!r}.")
        if label is not None and (not isinstance(label, str) or not label):
            raise RuleError(f"{who}: label must be a non-empty string, got {label!r}.")
        who = f"rule {label or effect.name!r}"
        if not isinstance(optional, bool):
            raise RuleError(f"{who}: optional must be True or False, got {optional!r}.")
        if where is not None and not callable(where) and not isinstance(where, Position):
            raise RuleError(f"{who}: where must be a function of a Site, or a position, got {where!r}.")
        _check_place(on, op, param, reduction, who)
        if on != "param" and isinstance(where, Position):
            raise RuleError(f"{who}: where={where!r} selects layers by their parameters, but on={on!r}. Leave one out.")
        if via is not None and not (isinstance(via, str) and via in effect.definition.vias):
            has = ", ".join(map(repr, effect.definition.vias))
            raise RuleError(f"{who}: {effect.name} has no via={via!r}; it has {has}.")
        if on != "param" and (via or effect.definition.default_via) != "penalty":
            raise RuleError(
                f"{who}: on={on!r} is for penalties in the graph (via='penalty'), and this is {effect!r} "
                f"via={via or effect.definition.default_via!r}. Mend the effect or via=, or leave out on=."
            )
        if effect.definition.anchors and on != "param":
            raise RuleError(
                f"{who}: {effect.name} has a tensor for each parameter ({effect.definition.anchors[0]}), and "
                "activations have none. Leave out on=."
            )
        if isinstance(effect.definition, FunctionPenalty) and (on != "input" or layer or op or name or exclude):
            raise RuleError(
                f"{who}: {effect.name} is about how the whole model's output follows its input: on='input', and no "
                "layer=, op=, name= or exclude=."
            )
        fields: dict[str, Any] = {
            "effect": effect,
            "layer": None if layer is None else checked_layers(layer, who),
            "op": op,
            "name": None if name is None else _checked_pattern(name, "name", who),
            "param": _checked_pattern(param, "param", who),
            "exclude": tuple(_checked_pattern(p, "exclude", who) for p in several(exclude)),
            "where": where,
            "on": on,
            "optional": optional,
            "via": via,
            "reduction": reduction,
            "label": label,
        }
        for field, value in fields.items():
            object.__setattr__(self, field, value)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers asked for; none means any."""
        assert self.layer is None or isinstance(self.layer, tuple)
        return self.layer or ()

    @property
    def position(self) -> Position | None:
        """What is asked of where a layer stands in the graph."""
        return self.where if isinstance(self.where, Position) else None

    @property
    def lowering(self) -> Via:
        """How the rule acts: its own `via`, or the effect's first."""
        return self.via or self.effect.definition.default_via

    def without_tensors(self) -> "Rule":
        """The same without the values of tensors that its effect was given by name."""
        result = copy.copy(self)
        object.__setattr__(result, "effect", self.effect.without_tensors())
        return result

    def conditions(self) -> list[str]:
        """The fields that select, as they were given."""
        return self._given(_Keys)

    def _given(self, fields: type) -> list[str]:
        values = {name: getattr(self, name) for name in fields.__dataclass_fields__}  # type: ignore[attr-defined]
        defaults = {name: spec.default for name, spec in fields.__dataclass_fields__.items()}  # type: ignore[attr-defined]
        return [f"{name}={_shown(value)}" for name, value in values.items() if value != defaults[name]]

    def __repr__(self) -> str:
        return f"Rule({', '.join([repr(self.effect), *self._given(_Keys), *self._given(_Acts)])})"


def checked_rules(rules: "Rule | Iterable[Rule]") -> tuple[Rule, ...]:
    """The rules as a tuple; a bare rule is a list of one."""
    if isinstance(rules, Rule):
        return (rules,)
    try:
        result = tuple(rules)
    except TypeError:
        raise RuleError(f"rules must be a sequence of fxreg.Rule, got {rules!r}.{_as_rule(rules)}") from None
    for position, rule in enumerate(result):
        if not isinstance(rule, Rule):
            raise RuleError(f"rules[{position}] must be a fxreg.Rule, got {rule!r}.{_as_rule(rule)}")
    return result


def _as_rule(found: object) -> str:
    """How to mend what was given in the place of a rule."""
    return f" Write fxreg.Rule({found!r}, …), which says where it acts." if isinstance(found, Effect) else ""


def matcher(pattern: str) -> Callable[[str], object]:
    """What says whether a whole name matches: a glob in which `*` crosses dots, or `"re:…"`."""
    if pattern.startswith(_REGEX):
        return re.compile(pattern.removeprefix(_REGEX)).fullmatch
    if is_literal(pattern):
        return pattern.__eq__
    return re.compile(fnmatch.translate(pattern)).match


def is_literal(pattern: str) -> bool:
    """Whether only the name that it spells matches."""
    return not pattern.startswith(_REGEX) and _WILDCARDS.isdisjoint(pattern)


def _shown(value: object) -> str:
    if isinstance(value, tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    return getattr(value, "__name__", None) or repr(value)


def op_name(op: Op) -> str:
    """What an `op` is called."""
    return op if isinstance(op, str) else str(getattr(op, "__name__", op))


def _check_place(on: object, op: object, param: object, reduction: object, who: str) -> None:
    """Raise unless what a rule acts on fits together."""
    if not isinstance(on, str) or on not in get_args(On):
        raise RuleError(f"{who}: on must be {_choice(On)}, got {on!r}.")
    if not isinstance(reduction, str) or reduction not in get_args(Reduction):
        raise RuleError(f"{who}: reduction must be {_choice(Reduction)}, got {reduction!r}.")
    if op is not None and not callable(op) and not (isinstance(op, str) and is_dotted(op)):
        raise RuleError(f"{who}: op must be a function or method, or its name such as 'relu', got {op!r}.")
    if isinstance(op, type):
        raise RuleError(f"{who}: op={op.__name__} is a class; modules are selected with layer=.")
    if on == "param" and op is not None:
        raise RuleError(f"{who}: op={_shown(op)} selects activations. Say which with on='output' or on='input'.")
    if on == "param" and reduction != "sum":
        raise RuleError(f"{who}: reduction={reduction!r} is for activations. Leave it out, or mend on=.")
    if on != "param" and param != "*":
        raise RuleError(f"{who}: param={param!r} selects parameters, but on={on!r}. Leave one of them out.")


def _choice(literal: Any) -> str:
    *others, last = map(repr, get_args(literal))
    return f"{', '.join(others)} or {last}"


def _checked_pattern(pattern: object, field: str, who: str) -> str:
    """A pattern as text; a compiled one becomes the `"re:…"` that says the same."""
    if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str):
        more = pattern.flags & ~re.compile(pattern.pattern).flags  # than the text says itself
        flags = "".join(letter for letter, flag in _FLAGS.items() if more & flag)
        return f"{_REGEX}(?{flags}){pattern.pattern}" if flags else f"{_REGEX}{pattern.pattern}"
    if not isinstance(pattern, str):
        raise RuleError(f"{who}: {field} must be a glob or a compiled pattern of str, got {pattern!r}.")
    if pattern.startswith(_REGEX):
        try:
            re.compile(pattern.removeprefix(_REGEX))
        except (re.error, OverflowError, RecursionError) as error:
            raise RuleError(f"{who}: {field}={pattern!r} does not compile: {error}.") from None
    return pattern
