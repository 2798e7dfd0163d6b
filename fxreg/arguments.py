"""The parameters of an effect: how an operator's schema writes them, and which values they take."""

import inspect
import math
import numbers
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor

from .errors import RuleError

Strength: TypeAlias = Annotated[Tensor, "strength"]
"""Annotates a formula's own strength: given as a number, live as a 0-d tensor in `fxreg.strengths`."""
Stream: TypeAlias = Annotated[Tensor, "stream"]
"""Annotates a formula's random stream, the int64 tensor `[key, step]`: one per parameter, advanced every forward."""
Anchor: TypeAlias = Annotated[Any, "anchor"]
"""Annotates a tensor that a formula has for each parameter, of its shape: given as a mapping of full parameter names to
tensors, a `state_dict` say. Left out, where the default is None, it is a copy of the parameter as `transform` finds it.
"""


@dataclass(frozen=True, eq=False)
class ByName:
    """The tensors that an effect was given for its parameters, by full name."""

    tensors: Mapping[str, Any]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ByName) or self.tensors.keys() != other.tensors.keys():
            return False
        return all(are_equal(value, other.tensors[name]) for name, value in self.tensors.items())

    def __hash__(self) -> int:
        return hash(frozenset(self.tensors))

    def __repr__(self) -> str:
        return f"<{len(self.tensors)} tensor{'s' * (len(self.tensors) != 1)} by name>"

    def on_meta(self) -> "ByName":
        """The same without any values: shapes and data types."""
        return ByName({n: t.to("meta") if isinstance(t, Tensor) else t for n, t in self.tensors.items()})


def are_equal(left: object, right: object) -> bool:
    """Whether two arguments of an effect are the same; tensors on the meta device have no values to be equal."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        alike = left.shape == right.shape and left.dtype == right.dtype and left.device == right.device
        return left is right or (alike and not left.is_meta and torch.equal(left, right))
    return type(left) is type(right) and bool(left == right)


@dataclass(frozen=True)
class Argument:
    """One parameter of a factory: how it is written in the operator's schema, and its default."""

    name: str
    schema: str
    default: object = inspect.Parameter.empty

    @property
    def is_strength(self) -> bool:
        return self.schema == "strength"


def read_arguments(function: Callable[..., Any], leading: int) -> Iterator[Argument]:
    """The named parameters of a formula, behind its `leading` tensors."""
    effect = function.__name__
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as error:
        raise RuleError(f"effect {effect!r}: an annotation cannot be resolved: {error}.") from None
    own = list(inspect.signature(function).parameters.values())
    named_only = any(p.kind is p.KEYWORD_ONLY for p in own[:leading])
    if len(own) < leading or named_only or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in own):
        raise RuleError(
            f"effect {effect!r}: its function must take {leading} tensor(s) first and then named parameters, but its "
            f"signature is {inspect.signature(function)}."
        )
    for parameter in own[leading:]:
        if parameter.name in _RESERVED:
            raise RuleError(f"effect {effect!r}: the parameter name {parameter.name!r} is taken; rename it.")
        hint = hints.get(parameter.name, type(parameter.default))
        schema = _schema_of(effect, parameter.name, hint)
        if schema == "anchor" and parameter.default not in (None, inspect.Parameter.empty):
            raise RuleError(
                f"effect {effect!r}: the default of {parameter.name!r} can only be None: the parameter's copy."
            )
        yield Argument(parameter.name, schema, parameter.default)


def signature(arguments: Iterable[Argument], returns: type) -> inspect.Signature:
    """How a factory is called: what has no default comes first."""
    own = [a for a in arguments if a.schema != "stream"]
    return inspect.Signature(
        [
            inspect.Parameter(a.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=a.default)
            for a in sorted(own, key=lambda a: a.default is not inspect.Parameter.empty)
        ],
        return_annotation=returns,
    )


def schema(arguments: Iterable[Argument], leading: Iterable[str], tail: str) -> str:
    """An operator's arguments: the leading tensors, the strengths and stream, then the named ones."""
    kinds = {"strength": "Tensor {}", "stream": "Tensor(a!) {}"}
    first, named = [], []
    for one in arguments:
        if one.schema in kinds:
            first.append(kinds[one.schema].format(one.name))
        else:
            named.append(f"{'Tensor' if one.schema == 'anchor' else one.schema} {one.name}")
    named += [tail] if tail else []
    return f"({', '.join([*leading, *first, *(['*'] if named else []), *named])}) -> Tensor"


def checked_strength(value: object, where: str) -> float:
    """A strength as a float, or a RuleError: strengths are finite and not negative."""
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex() and not value.is_meta:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RuleError(f"{where}: a strength is a number, got {value!r}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise RuleError(f"{where}: a strength is finite and not negative, got {number!r}.")
    return number


_RESERVED = {"self", "weight", "grad", "value", "scale"}

_SCHEMAS: dict[Any, str] = {
    Tensor: "Tensor",
    float: "float",
    int: "int",
    bool: "bool",
    str: "str",
    int | tuple[int, ...]: "int[]",
    tuple[int, ...]: "int[]",
    tuple[float, ...]: "float[]",
}


def _schema_of(effect: str, parameter: str, hint: Any) -> str:
    if typing.get_origin(hint) is Annotated and hint.__metadata__[0] in ("strength", "stream", "anchor"):
        kind: str = hint.__metadata__[0]
        if kind == "stream" and parameter != "stream":
            raise RuleError(f"effect {effect!r}: call its random stream 'stream', not {parameter!r}.")
        return kind
    if hint in _SCHEMAS:
        return _SCHEMAS[hint]
    raise RuleError(
        f"effect {effect!r}, parameter {parameter!r}: an operator cannot take {hint!r}. Annotate it as one of float, "
        "int, bool, str, Tensor, tuple[int, ...], int | tuple[int, ...], tuple[float, ...], fxreg.Strength or "
        "fxreg.Anchor."
    )


def coerced(effect: str, argument: Argument, value: object) -> object:
    """A value as an effect keeps it, or a RuleError."""
    if argument.schema == "anchor":
        return _by_name(effect, argument, value)
    match argument.schema, value:
        case ("Tensor", Tensor()) | ("bool", bool()) | ("str", str()):
            return value.detach() if isinstance(value, Tensor) else value
        case ("int", _) if _is_int(value):
            return value
        case ("float", _) if _is_float(value):
            return float(value)  # type: ignore[arg-type]
        case ("int[]", _) if _is_int(value):
            return (value,)
        case ("int[]", tuple() | list()) if all(map(_is_int, value)):
            return tuple(value)
        case ("float[]", tuple() | list()) if all(map(_is_float, value)):
            return tuple(map(float, value))
    raise RuleError(f"{effect}({argument.name}=…): expected {argument.schema}, got {value!r}.")


def _by_name(effect: str, argument: Argument, value: object) -> ByName | None:
    if isinstance(value, Mapping):
        return ByName(dict(value))
    if isinstance(value, ByName) or (value is None and argument.default is None):
        return value
    raise RuleError(
        f"{effect}({argument.name}=…): expected a mapping of full parameter names to tensors, such as a state_dict, "
        f"got {value if value is None else type(value).__name__}."
    )


def _is_int(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_float(value: object) -> bool:
    return (type(value) is float and not math.isnan(value)) or (type(value) is int and abs(value) < 2**1023)
