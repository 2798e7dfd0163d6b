"""What an effect is: a formula, registered once by a decorator, from which its factory and operators follow.

Each family of formulas has a file. A decorated function becomes a *definition*; calling the
definition with a strength gives an *effect*, the frozen value that a rule carries.
"""

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, ParamSpec, TypeAlias, overload

import torch
from torch import Tensor

from . import operators
from .arguments import Argument, ByName, are_equal, checked_strength, coerced, read_arguments, schema, signature
from .defining import define
from .errors import RuleError
from .fingerprints import Fingerprint
from .formulas import GradientFormula, PenaltyFormula, ProximalFormula, as_given, misfit

Via: TypeAlias = Literal["penalty", "gradient", "optimizer", "proximal"]
P = ParamSpec("P")

registry: dict[str, "Definition[Any]"] = {}
"""Every effect by name, built in or decorated by a user."""


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
        return all(are_equal(value, other.arguments[name]) for name, value in self.arguments.items())

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
        named = [f"{name}={_shown(value)}" for name, value in self.arguments.items() if value is not None]
        return f"{self.name}({', '.join(strengths + named)})"

    def without_tensors(self) -> "Effect":
        """The same without the values of tensors that were given by name."""
        if not any(isinstance(value, ByName) for value in self.arguments.values()):
            return self
        hollow = {name: v.on_meta() if isinstance(v, ByName) else v for name, v in self.arguments.items()}
        return _effect(self.definition, dict(self.strengths), hollow)


def _effect(definition: "Definition[Any]", strengths: dict[str, float], arguments: dict[str, Any]) -> Effect:
    return Effect(definition, types.MappingProxyType(strengths), types.MappingProxyType(arguments))


def _shown(value: object) -> str:
    value = value[0] if isinstance(value, tuple) and len(value) == 1 else value  # as it is mostly given
    return f"<tensor {tuple(value.shape)}>" if isinstance(value, Tensor) else repr(value)


class Definition(Generic[P]):
    """A named formula. Call it with a strength and arguments to get the effect for a `Rule`."""

    default_via: Via
    leading: int  # how many of the formula's first parameters are the site's own tensors
    is_joint = False  # whether the formula takes all the sites of a rule at once
    prox: ProximalFormula | None = None
    _check: Callable[..., None] | None = None

    def __init__(self, function: Callable[..., Any]) -> None:
        if not isinstance(function, types.FunctionType) or not function.__name__.isidentifier():
            raise RuleError(f"an effect is made from a function with a name (def …), got {function!r}.")
        self.function = function
        self.name: str = function.__name__
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__
        self.__name__, self.__qualname__ = function.__name__, function.__qualname__
        self.__wrapped__ = function
        self.parameters = tuple(self._read_parameters())
        self._misfits: dict[tuple[object, ...], str | None] = {}
        self.__signature__ = signature(self.parameters, Effect)
        self.usage = f"{self.name}{self.__signature__}".partition(" ->")[0]
        self.fingerprint = Fingerprint()
        self.register()

    def check(self, function: Callable[..., None]) -> Callable[..., None]:
        """Register what raises ValueError for arguments that ask for the impossible; it takes them by name."""
        self._check = function
        return function

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

    @property
    def anchors(self) -> tuple[str, ...]:
        """The arguments that are a tensor for each parameter."""
        return _anchors(self.parameters)

    def misfit(self, effect: Effect, shape: torch.Size, dtype: torch.dtype) -> str | None:
        """What goes wrong when the formula meets a parameter of this shape, whatever the strength.

        Found on the meta device, and once only where no argument is a tensor.
        """
        if any(isinstance(value, Tensor) for value in effect.arguments.values()):
            return self._try(effect, shape, dtype)
        own = (item for item in effect.arguments.items() if item[0] not in self.anchors)
        case = (*own, shape, dtype)
        if case not in self._misfits:
            self._misfits[case] = self._try(effect, shape, dtype)
        return self._misfits[case]

    def _try(self, effect: Effect, shape: torch.Size, dtype: torch.dtype) -> str | None:
        try:
            return self._trial(torch.empty(shape, dtype=dtype, device="meta"), effect)
        except NotImplementedError:
            return None  # the formula looks at values, which nothing on the meta device has
        except Exception as error:
            if any(words in str(error) for words in ("meta tensor", "device meta")):
                return None  # or it computes with a tensor of its own, which is elsewhere
            return f"{type(error).__name__}: {error}".rstrip(".")

    def _trial(self, weight: Tensor, effect: Effect) -> str | None:
        return None

    def _trial_arguments(self, weight: Tensor, effect: Effect) -> dict[str, Any]:
        own = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in effect.arguments.items()}
        return own | dict.fromkeys(self.anchors, weight)

    def register(self) -> None:
        """Enter the registry, replacing an effect of the same name, and define the operators."""
        self.refresh()
        registry[self.name] = self

    def refresh(self) -> None:
        """Define operators anew if a function that the formula calls, or a constant that it reads, is another now."""
        now = Fingerprint(type(self).__name__, *self._meaning())
        if now != self.fingerprint:
            self.fingerprint = now
            self._misfits.clear()
            self._define_operators()

    def _meaning(self) -> tuple[object, ...]:
        """What operators and companions compute with."""
        return self.parameters, self.function, self.prox

    def _define_operators(self) -> None:
        """Define the operators of the formula; an effect without a node has none."""

    def _read_parameters(self) -> Iterator[Argument]:
        return read_arguments(self.function, self.leading)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Effect:
        try:
            bound = self.__signature__.bind(*args, **kwargs)
        except TypeError as error:
            raise RuleError(f"{self.usage}: {error}.") from None
        bound.apply_defaults()
        strengths, arguments = {}, {}
        for argument in self.parameters:
            if argument.is_strength:
                strengths[argument.name] = checked_strength(
                    bound.arguments[argument.name], f"{self.name}({argument.name}=…)"
                )
            elif argument.schema != "stream":
                arguments[argument.name] = coerced(self.name, argument, bound.arguments[argument.name])
        effect = _effect(self, strengths, arguments)
        if self._check is not None:
            try:
                self._check(**arguments)
            except ValueError as error:
                raise RuleError(f"{effect!r}: {error}.") from None
        return effect

    def schema(self, *leading: str, tail: str = "") -> str:
        """The operator's arguments: the leading tensors, the strengths and stream, then the named ones."""
        return schema(self.parameters, leading, tail)

    def __repr__(self) -> str:
        return f"<fxreg effect {self.usage}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Definition[P]":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        self.refresh()
        return (_registered, (self.name, str(self.fingerprint)))


def _anchors(parameters: Iterable[Argument]) -> tuple[str, ...]:
    return tuple(a.name for a in parameters if a.schema == "anchor")


def _registered(name: str, fingerprint: str) -> Definition[Any]:
    found = registry.get(name)
    if found is not None:
        found.refresh()
    if found is None or found.fingerprint != fingerprint:
        what = "is not registered" if found is None else "has another formula, or its formula uses other functions,"
        raise RuleError(
            f"unpickling effect {name!r}: it {what} in this process. Import the module that defines it, unchanged, "
            "with the same version of fxreg and of Python."
        )
    return found


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
        self.formula = replace(self.formula, anchors=_anchors(parameters))
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
        proximal: tuple[Via, ...] = ("proximal",) if self.prox is not None else ()
        return ("penalty", *gradient, *optimizer, *proximal)

    def gradient(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Register the closed-form gradient dR/dw of the formula, with the formula's own parameters."""
        self.formula = replace(self.formula, closed_form=function)
        self.register()
        return function

    @overload
    def proximal(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]: ...
    @overload
    def proximal(self, *, foreach: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
    def proximal(self, function: Any = None, *, foreach: bool = False) -> Any:
        """Register the proximal operator of the formula R: argmin_u ½‖u − weight‖² + step·R(u).

        The function takes (weight, step) and then the formula's own parameters. The strength is in the step, which is
        a 0-d tensor, the learning rate times the strength; a formula with strengths of its own gets those by name, and
        the learning rate as the step. With `foreach`, for operators that act on each element by itself, the function
        takes a list of weights of one dtype and device, and returns a list.
        """
        if function is None:
            return lambda f: self._take_proximal(f, foreach)
        return self._take_proximal(function, foreach)

    def _take_proximal(self, function: Callable[..., Any], foreach: bool) -> Callable[..., Any]:
        self.prox = ProximalFormula(function, self.formula.implicit, foreach, self.anchors)
        self.register()
        return function

    def _meaning(self) -> tuple[object, ...]:
        return *super()._meaning(), self.formula

    def _trial(self, weight: Tensor, effect: Effect) -> str | None:
        strengths = {name: weight.new_ones((), dtype=torch.float64) for name in effect.strengths}
        value = self.formula.value(weight, strengths, self._trial_arguments(weight, effect))
        return None if value.ndim == 0 else f"the penalty has shape {tuple(value.shape)}, and must be 0-d"

    def _define_operators(self) -> None:
        formula, names = self.formula, self.live_names  # an operator keeps the formula it was registered with
        own_name = self.name

        def value(weight: Tensor, *tensors: Tensor, value: bool = True, **arguments: Any) -> Tensor:
            if not weight.is_floating_point():  # of parameters, matching says so
                raise RuleError(
                    f"{own_name} penalizes floating-point tensors, and met one of {weight.dtype}, of shape "
                    f"{tuple(weight.shape)}. Narrow the rule, or mend on= or op=."
                )
            if not value and not (torch.is_grad_enabled() and weight.requires_grad):
                return weight.new_zeros((), dtype=operators.accumulation_dtype(weight.dtype))
            arguments = as_given(arguments)
            if not value and formula.closed_form is not None:
                return operators.deferred(seeded, arguments, weight, *tensors)
            try:
                return formula.value(weight, dict(zip(names, tensors, strict=True)), arguments)
            except (IndexError, ValueError) as error:
                raise misfit(own_name, weight, error) from error

        def seeded(seed: Tensor, weight: Tensor, tensors: tuple[Tensor, ...], arguments: dict[str, Any]) -> Tensor:
            try:
                return formula.gradient(seed, weight, dict(zip(names, tensors, strict=True)), arguments)
            except (IndexError, ValueError) as error:
                raise misfit(own_name, weight, error) from error

        def pull(grad: Tensor, weight: Tensor, tensors: tuple[Tensor, ...], arguments: dict[str, Any]) -> Tensor:
            scale, *strengths = tensors
            seed = operators.scalar(scale).to(grad)
            return formula.added(grad, seed, weight, dict(zip(names, strengths, strict=True)), arguments)

        self.operator = define(self.name, self.fingerprint, self.schema("Tensor weight", tail="bool value=True"), value)
        if formula.closed_form is not None:
            self.gradient_operator = define(
                f"{self.name}_gradient",
                self.fingerprint,
                self.schema("Tensor weight", "Tensor scale"),
                lambda weight, *tensors, **arguments: operators.pulled(pull, as_given(arguments), weight, *tensors),
            )


class Gradient(Definition[P]):
    """An effect that maps the loss's gradient of a parameter to another one."""

    default_via = "gradient"
    leading = 2

    def __init__(self, function: Callable[..., Any], detach: bool = False) -> None:
        self.formula = GradientFormula(function)
        self.detach = detach
        super().__init__(function)

    def _read_parameters(self) -> Iterator[Argument]:
        parameters = list(super()._read_parameters())
        self.formula = replace(self.formula, anchors=_anchors(parameters))
        return iter(parameters)

    def _meaning(self) -> tuple[object, ...]:
        return *super()._meaning(), self.detach

    def _trial(self, weight: Tensor, effect: Effect) -> str | None:
        live = {name: weight.new_ones(()) for name in self.live_names}
        if self.has_stream:
            live["stream"] = weight.new_ones(2, dtype=torch.int64)
        arguments = self._trial_arguments(weight, effect)
        self.formula.transform(weight, weight, weight.new_ones(()), live, arguments)
        return None

    def _define_operators(self) -> None:
        if self.detach:
            self.operator = define(
                self.name, self.fingerprint, "(Tensor weight, Tensor scale) -> Tensor", lambda w, scale: w.detach()
            )
            return
        formula, names = self.formula, self.live_names
        stream_at = names.index("stream") + 1 if self.has_stream else None

        def pull(grad: Tensor, weight: Tensor, tensors: tuple[Tensor, ...], arguments: dict[str, Any]) -> Tensor:
            scale, *live = tensors
            return formula.transform(grad, weight, scale, dict(zip(names, live, strict=True)), arguments)

        def gradient(weight: Tensor, *tensors: Tensor, **arguments: Any) -> Tensor:
            if stream_at is not None:
                operators.advance(tensors[stream_at])
            return operators.pulled(pull, as_given(arguments), weight, *tensors)

        self.operator = define(self.name, self.fingerprint, self.schema("Tensor weight", "Tensor scale"), gradient)


def strength_name(label: str, effect: Effect, own: str) -> str:
    """What `fxreg.strengths` calls an effect's strength."""
    return label if len(effect.strengths) == 1 else f"{label}.{own}"
