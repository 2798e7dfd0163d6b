"""What an effect is: a formula, registered once by a decorator, from which its factory and operators follow.

`regularizers.py` and `gradients.py` hold the formulas. A decorated function becomes a *definition*; calling the
definition with a strength gives an *effect*, the frozen value that a rule carries.
"""

import ast
import hashlib
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Concatenate, Generic, Literal, ParamSpec, TypeAlias, overload

import torch
from torch import Tensor

from . import operators
from .errors import RuleError

Via: TypeAlias = Literal["penalty", "gradient", "optimizer", "proximal"]
Strength: TypeAlias = Annotated[Tensor, "strength"]
"""Annotates a formula's own strength: given as a number, live as a 0-d tensor in `fxreg.strengths`."""
Stream: TypeAlias = Annotated[Tensor, "stream"]
"""Annotates a formula's random stream, the int64 tensor `[key, step]`: one per parameter, advanced every forward."""

P = ParamSpec("P")

registry: dict[str, "Definition[Any]"] = {}
"""Every effect by name, built in or decorated by a user."""


@dataclass(frozen=True)
class Argument:
    """One parameter of a factory: how it is written in the operator's schema, and its default."""

    name: str
    schema: str
    default: object = inspect.Parameter.empty

    @property
    def is_strength(self) -> bool:
        return self.schema == "strength"


@dataclass(frozen=True, eq=False)
class Effect:
    """A formula with its strengths and arguments: what a rule does to the sites it matches."""

    definition: "Definition[Any]"
    strengths: Mapping[str, float]
    arguments: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.definition.name

    def same_but_strength(self, other: "Effect") -> bool:
        """Whether the two say the same thing, however strongly."""
        if self.definition is not other.definition or self.arguments.keys() != other.arguments.keys():
            return False
        return all(_equal(value, other.arguments[name]) for name, value in self.arguments.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Effect) and self.strengths == other.strengths and self.same_but_strength(other)

    def __hash__(self) -> int:
        return hash((self.name, tuple(self.strengths.items())))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Effect":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (_effect, (self.definition, dict(self.strengths), dict(self.arguments)))

    def __repr__(self) -> str:
        strengths = [
            f"{value:g}" if len(self.strengths) == 1 else f"{name}={value:g}" for name, value in self.strengths.items()
        ]
        return f"{self.name}({', '.join(strengths + [f'{k}={_shown(v)}' for k, v in self.arguments.items()])})"


def _effect(definition: "Definition[Any]", strengths: dict[str, float], arguments: dict[str, Any]) -> Effect:
    return Effect(definition, types.MappingProxyType(strengths), types.MappingProxyType(arguments))


def _equal(left: object, right: object) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        alike = left.shape == right.shape and left.dtype == right.dtype and left.device == right.device
        return left is right or (alike and not left.is_meta and torch.equal(left, right))
    return type(left) is type(right) and left == right


def _shown(value: object) -> str:
    return f"<tensor {tuple(value.shape)}>" if isinstance(value, Tensor) else repr(value)


class Definition(Generic[P]):
    """A named formula. Call it with a strength and arguments to get the effect for a `Rule`."""

    default_via: Via
    leading: int  # how many of the formula's first parameters are the site's own tensors

    def __init__(self, function: Callable[..., Any]) -> None:
        if not isinstance(function, types.FunctionType) or not function.__name__.isidentifier():
            raise RuleError(f"an effect is made from a function with a name (def …), got {function!r}.")
        self.function = function
        self.name: str = function.__name__
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__
        self.__name__ = function.__name__
        self.__qualname__ = function.__qualname__
        self.__wrapped__ = function
        self.parameters = tuple(self._read_parameters())
        arguments = [a for a in self.parameters if a.schema != "stream"]
        self.__signature__ = inspect.Signature(
            [
                inspect.Parameter(a.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=a.default)
                for a in sorted(arguments, key=lambda a: a.default is not inspect.Parameter.empty)
            ],
            return_annotation=Effect,
        )
        self.register()

    @property
    def vias(self) -> tuple[Via, ...]:
        """The lowerings this effect has."""
        return (self.default_via,)

    @property
    def live_names(self) -> tuple[str, ...]:
        """The strengths and the stream, in the order of the operator's schema."""
        return tuple(a.name for a in self.parameters if a.schema in ("strength", "stream"))

    @property
    def has_stream(self) -> bool:
        return any(a.schema == "stream" for a in self.parameters)

    def misfit(self, effect: Effect, shape: torch.Size, dtype: torch.dtype) -> str | None:
        """What goes wrong when the formula meets a parameter of this shape, found on the meta device."""
        try:
            return self._trial(torch.empty(shape, dtype=dtype, device="meta"), effect)
        except NotImplementedError:
            return None  # the formula looks at values, which nothing on the meta device has
        except Exception as error:
            return None if "meta tensor" in str(error) else f"{type(error).__name__}: {error}".rstrip(".")

    def _trial(self, weight: Tensor, effect: Effect) -> str | None:
        return None

    def register(self) -> None:
        """Enter the registry, replacing an effect of the same name, and define the operators."""
        meaning = "\n".join([repr(self.parameters), *map(_source, self._functions())])
        self.fingerprint = "x" + hashlib.sha256(meaning.encode()).hexdigest()[:8]
        self._define_operators()
        registry[self.name] = self

    def _functions(self) -> tuple[Callable[..., Any], ...]:
        return (self.function,)

    def _define_operators(self) -> None:
        """Define the operators of the formula; an effect without a node has none."""

    def _read_parameters(self) -> Iterator[Argument]:
        try:
            hints = typing.get_type_hints(self.function, include_extras=True)
        except Exception as error:
            raise RuleError(f"effect {self.name!r}: an annotation cannot be resolved: {error}.") from None
        own = list(inspect.signature(self.function).parameters.values())
        first = {p.kind for p in own[: self.leading]}
        if (
            len(own) < self.leading
            or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in own)
            or inspect.Parameter.KEYWORD_ONLY in first
        ):
            raise RuleError(
                f"effect {self.name!r}: its function must take {self.leading} tensor(s) first and then named "
                f"parameters, but its signature is {inspect.signature(self.function)}."
            )
        for parameter in own[self.leading :]:
            if parameter.name in _RESERVED:
                raise RuleError(f"effect {self.name!r}: the parameter name {parameter.name!r} is taken; rename it.")
            hint = hints.get(parameter.name, type(parameter.default))
            yield Argument(parameter.name, _schema_of(self.name, parameter.name, hint), parameter.default)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Effect:
        try:
            bound = self.__signature__.bind(*args, **kwargs)
        except TypeError as error:
            raise RuleError(f"{self.name}{self.__signature__}: {error}.") from None
        bound.apply_defaults()
        strengths, arguments = {}, {}
        for argument in self.parameters:
            if argument.is_strength:
                strengths[argument.name] = checked_strength(
                    bound.arguments[argument.name], f"{self.name}({argument.name}=…)"
                )
            elif argument.schema != "stream":
                arguments[argument.name] = _coerced(self.name, argument, bound.arguments[argument.name])
        return _effect(self, strengths, arguments)

    def schema(self, *leading: str, tail: str = "") -> str:
        """The operator's arguments: the leading tensors, the strengths and stream, then the named ones."""
        kinds = {"strength": "Tensor {}", "stream": "Tensor(a!) {}"}
        first = [kinds[a.schema].format(a.name) for a in self.parameters if a.schema in kinds]
        named = [f"{a.schema} {a.name}" for a in self.parameters if a.schema not in kinds]
        named += [tail] if tail else []
        return f"({', '.join([*leading, *first, *(['*'] if named else []), *named])}) -> Tensor"

    def __repr__(self) -> str:
        return f"<fxreg effect {self.name}{self.__signature__}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Definition[P]":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (_registered, (self.name, self.fingerprint))


def _named(names: tuple[str, ...], tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return dict(zip(names, tensors, strict=True))


def _as_given(arguments: dict[str, Any]) -> dict[str, Any]:
    """An operator's arguments as its formula takes them: the dispatcher turns tuples into lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}


def _on_meta(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in arguments.items()}


def _registered(name: str, fingerprint: str) -> Definition[Any]:
    found = registry.get(name)
    if found is None or found.fingerprint != fingerprint:
        what = "is not registered" if found is None else "is registered with another formula"
        raise RuleError(
            f"unpickling effect {name!r}: it {what} in this process. Import the module that defines it, unchanged."
        )
    return found


@dataclass(frozen=True)
class PenaltyFormula:
    """R(w), its gradient in closed form where there is one, and how strengths enter.

    Attributes:
        function: R, or the penalty itself where the formula has strengths of its own.
        closed_form: dR/dw.
        implicit: whether one strength multiplies R from outside.
    """

    function: Callable[..., Tensor]
    closed_form: Callable[..., Tensor] | None
    implicit: bool

    def value(self, weight: Tensor, strengths: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> Tensor:
        """s·R(w) as a 0-d tensor: autocast off, 16-bit weights in float32."""
        wide = weight.to(operators.accumulation_dtype(weight.dtype))
        return self._scaled(self.function, wide, None, strengths, arguments)

    def gradient(
        self, seed: Tensor, weight: Tensor, strengths: Mapping[str, Tensor], arguments: Mapping[str, Any]
    ) -> Tensor:
        """seed · s · dR/dw from the closed form."""
        assert self.closed_form is not None
        return self._scaled(self.closed_form, weight, seed, strengths, arguments)

    def _scaled(
        self,
        function: Callable[..., Tensor],
        weight: Tensor,
        seed: Tensor | None,
        strengths: Mapping[str, Tensor],
        arguments: Mapping[str, Any],
    ) -> Tensor:
        live = {name: strength.reshape(()).to(weight) for name, strength in strengths.items()}
        with operators.without_autocast(weight.device):
            factor = live.pop("strength") if self.implicit else None
            if seed is not None:
                factor = seed if factor is None else seed * factor
            result = function(weight, **live, **arguments)
            return result if factor is None else factor * result


class Penalty(Definition[P]):
    """An effect that adds s·R(w) to the objective."""

    default_via = "penalty"
    leading = 1

    def __init__(self, function: Callable[..., Any], weight_decay: float | None = None) -> None:
        self.weight_decay = weight_decay
        self.formula = PenaltyFormula(function, None, implicit=True)
        super().__init__(function)

    def _read_parameters(self) -> Iterator[Argument]:
        parameters = list(super()._read_parameters())
        if any(a.is_strength for a in parameters):
            self.formula = replace(self.formula, implicit=False)
        elif any(a.name == "strength" for a in parameters):
            raise RuleError(
                f"effect {self.name!r}: the strength multiplies the formula from outside. Drop its parameter "
                "'strength', or annotate it fxreg.Strength to use it inside."
            )
        else:
            yield Argument("strength", "strength")
        yield from parameters

    @property
    def vias(self) -> tuple[Via, ...]:
        gradient: tuple[Via, ...] = ("gradient",) if self.formula.closed_form else ()
        optimizer: tuple[Via, ...] = ("optimizer",) if self.weight_decay is not None else ()
        return ("penalty", *gradient, *optimizer)

    def gradient(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Register the closed-form gradient dR/dw of the formula, with the formula's own parameters."""
        self.formula = replace(self.formula, closed_form=function)
        self.register()
        return function

    def _functions(self) -> tuple[Callable[..., Any], ...]:
        return tuple(filter(None, (self.formula.function, self.formula.closed_form)))

    def _trial(self, weight: Tensor, effect: Effect) -> str | None:
        strengths = {name: weight.new_ones((), dtype=torch.float64) for name in effect.strengths}
        value = self.formula.value(weight, strengths, _on_meta(effect.arguments))
        return None if value.ndim == 0 else f"the penalty has shape {tuple(value.shape)}, and must be 0-d"

    def _define_operators(self) -> None:
        formula, names = self.formula, self.live_names  # an operator keeps the formula it was registered with

        def value(weight: Tensor, *tensors: Tensor, value: bool = True, **arguments: Any) -> Tensor:
            if not value and not (torch.is_grad_enabled() and weight.requires_grad):
                return weight.new_zeros((), dtype=operators.accumulation_dtype(weight.dtype))
            arguments = _as_given(arguments)
            if not value and formula.closed_form is not None:
                return operators.deferred(seeded, arguments, weight, *tensors)
            return formula.value(weight, _named(names, tensors), arguments)

        def seeded(seed: Tensor, weight: Tensor, tensors: tuple[Tensor, ...], arguments: dict[str, Any]) -> Tensor:
            return formula.gradient(seed, weight, _named(names, tensors), arguments)

        def pull(grad: Tensor, weight: Tensor, tensors: tuple[Tensor, ...], arguments: dict[str, Any]) -> Tensor:
            scale, *strengths = tensors
            # Subtracting the negative: Inductor turns `mm + r` into addmm, which writes r and reads it back.
            return grad - seeded(-scale.reshape(()).to(grad), weight, tuple(strengths), arguments)

        self.operator = operators.define(
            self.name, self.fingerprint, self.schema("Tensor weight", tail="bool value=True"), value
        )
        if formula.closed_form is not None:
            self.gradient_operator = operators.define(
                f"{self.name}_gradient",
                self.fingerprint,
                self.schema("Tensor weight", "Tensor scale"),
                lambda weight, *tensors, **arguments: operators.pulled(pull, _as_given(arguments), weight, *tensors),
            )


@dataclass(frozen=True)
class GradientFormula:
    """f(grad, weight), and how the loss scale and the tensors around it enter."""

    function: Callable[..., Tensor]

    def transform(
        self,
        grad: Tensor,
        weight: Tensor,
        scale: Tensor,
        live: Mapping[str, Tensor],
        arguments: Mapping[str, Any],
    ) -> Tensor:
        """scale · f(grad / scale); with scale ≠ 1 a gradient that is not finite passes unchanged."""
        factor = scale.reshape(()).to(grad)
        cast = {name: v.to(grad.device) for name, v in arguments.items() if isinstance(v, Tensor)}
        for name, tensor in live.items():
            cast[name] = tensor.reshape(()).to(grad) if tensor.is_floating_point() else tensor.to(grad.device)
        with operators.without_autocast(grad.device):
            result = self.function(grad / factor, weight, **{**arguments, **cast}) * factor
            if result.shape != grad.shape:
                raise RuleError(f"the new gradient has shape {tuple(result.shape)}, the old one {tuple(grad.shape)}")
            return torch.where((factor == 1) | grad.isfinite().all(), result, grad)


class Gradient(Definition[P]):
    """An effect that maps the loss's gradient of a parameter to another one."""

    default_via = "gradient"
    leading = 2

    def __init__(self, function: Callable[..., Any], detach: bool = False) -> None:
        self.formula = GradientFormula(function)
        self.detach = detach
        super().__init__(function)

    def _functions(self) -> tuple[Callable[..., Any], ...]:
        return (self.formula.function,)

    def _trial(self, weight: Tensor, effect: Effect) -> str | None:
        live = {name: weight.new_ones(()) for name in self.live_names}
        if self.has_stream:
            live["stream"] = weight.new_ones(2, dtype=torch.int64)
        self.formula.transform(weight, weight, weight.new_ones(()), live, _on_meta(effect.arguments))
        return None

    def _define_operators(self) -> None:
        if self.detach:
            self.operator = operators.define(
                self.name, self.fingerprint, "(Tensor weight, Tensor scale) -> Tensor", lambda w, scale: w.detach()
            )
            return
        formula, names = self.formula, self.live_names
        stream_at = names.index("stream") + 1 if self.has_stream else None

        def pull(grad: Tensor, weight: Tensor, tensors: tuple[Tensor, ...], arguments: dict[str, Any]) -> Tensor:
            scale, *live = tensors
            return formula.transform(grad, weight, scale, _named(names, live), arguments)

        def gradient(weight: Tensor, *tensors: Tensor, **arguments: Any) -> Tensor:
            if stream_at is not None:
                operators.advance(tensors[stream_at])
            return operators.pulled(pull, _as_given(arguments), weight, *tensors)

        self.operator = operators.define(
            self.name, self.fingerprint, self.schema("Tensor weight", "Tensor scale"), gradient
        )


class OptimizerOption(Definition[P]):
    """An effect that is an option of the optimizer and has no node."""

    default_via = "optimizer"
    leading = 0


@overload
def penalty(function: Callable[Concatenate[Tensor, P], Tensor]) -> Penalty[Concatenate[float, P]]: ...
@overload
def penalty(
    *, weight_decay: float
) -> Callable[[Callable[Concatenate[Tensor, P], Tensor]], Penalty[Concatenate[float, P]]]: ...
def penalty(function: Any = None, *, weight_decay: float | None = None) -> Any:
    """Register a penalty from its formula R(weight, *, named parameters) -> 0-d tensor.

    The strength s multiplies the formula from outside: the decorated name becomes a factory `name(s, …)`. A formula
    with strengths of its own annotates them `fxreg.Strength`. Redecorating a name replaces it.

    Args:
        function: the formula, of the weight (any shape; float32 or wider) and of named parameters annotated float,
            int, bool, str, Tensor or `int | tuple[int, ...]`.
        weight_decay: the d per unit of strength for which an optimizer's coupled `weight_decay=d` is exactly this.

    Raises:
        RuleError: a parameter that an operator's schema cannot hold.

    >>> import torch, fxreg
    >>> @fxreg.penalty
    ... def hoyer(weight: torch.Tensor, *, eps: float = 1e-8) -> torch.Tensor:
    ...     return weight.abs().sum() / (weight.norm() + eps)
    >>> hoyer(1e-3)
    hoyer(0.001, eps=1e-08)
    """
    if function is None:
        return lambda f: Penalty(f, weight_decay)
    return Penalty(function, weight_decay)


@overload
def gradient(function: Callable[Concatenate[Tensor, Tensor, P], Tensor]) -> Gradient[P]: ...
@overload
def gradient(*, detach: bool) -> Callable[[Callable[Concatenate[Tensor, Tensor, P], Tensor]], Gradient[P]]: ...
def gradient(function: Any = None, *, detach: bool = False) -> Any:
    """Register a gradient transform from its formula f(grad, weight, *, named parameters) -> Tensor.

    Args:
        function: the formula: `grad` and `weight` have the parameter's shape, in float32 or wider. A parameter
            annotated `fxreg.Strength` is a live 0-d tensor, one annotated `fxreg.Stream` a random stream.
        detach: cut the parameter off instead: its gradient is None, and the formula is never called.

    Raises:
        RuleError: a parameter that an operator's schema cannot hold.

    >>> import torch, fxreg
    >>> @fxreg.gradient
    ... def sign(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    ...     return grad.sign()
    >>> sign()
    sign()
    """
    if function is None:
        return lambda f: Gradient(f, detach)
    return Gradient(function, detach)


def strength_name(label: str, effect: Effect, own: str) -> str:
    """What `fxreg.strengths` calls an effect's strength."""
    return label if len(effect.strengths) == 1 else f"{label}.{own}"


def checked_strength(value: object, where: str) -> float:
    """A strength as a float, or a RuleError: strengths are finite and not negative."""
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex() and not value.is_meta:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
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
    if typing.get_origin(hint) is Annotated and hint.__metadata__[0] in ("strength", "stream"):
        kind: str = hint.__metadata__[0]
        if kind == "stream" and parameter != "stream":
            raise RuleError(f"effect {effect!r}: call its random stream 'stream', not {parameter!r}.")
        return kind
    if hint in _SCHEMAS:
        return _SCHEMAS[hint]
    raise RuleError(
        f"effect {effect!r}, parameter {parameter!r}: an operator cannot take {hint!r}. Annotate it as one of float, "
        "int, bool, str, Tensor, tuple[int, ...], int | tuple[int, ...], tuple[float, ...] or fxreg.Strength."
    )


def _coerced(effect: str, argument: Argument, value: object) -> object:
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


def _is_int(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_float(value: object) -> bool:
    return (type(value) is float and not math.isnan(value)) or (type(value) is int and abs(value) < 2**1023)


def _source(function: Callable[..., Any]) -> str:
    """What decides a formula's meaning, as text: its syntax tree without docstring, its defaults and closure."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        if isinstance(tree, ast.FunctionDef):
            tree.decorator_list = []
            if isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Constant):
                tree.body = tree.body[1:]
        text = ast.dump(tree)
    except (OSError, TypeError, SyntaxError):  # typed at a prompt, or made by exec
        code = function.__code__
        text = repr((code.co_code, code.co_consts, code.co_names))
    around = [cell.cell_contents for cell in function.__closure__ or ()]
    around += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return "\n".join([text, *map(_identity, around)])


def _identity(value: object) -> str:
    """A text that two values share only if a formula cannot tell them apart."""
    if isinstance(value, Tensor) and value.device.type != "meta":
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"tensor {value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
    if isinstance(value, types.FunctionType):
        return _source(value)
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({','.join(map(_identity, value))})"
    if isinstance(value, bool | int | float | complex | str | bytes | types.NoneType | types.ModuleType | type):
        return repr(value)
    return f"{type(value).__qualname__} at {id(value)}"  # alive as long as the formula is, so no other has this id
