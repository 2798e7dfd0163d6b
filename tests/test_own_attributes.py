"""What a module writes to itself is no attribute of what is no module: whoever takes that apart is in the graph."""

import copy
import copy as another
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxreg
from fxreg.mentions import sayings
from fxreg.methods import methods_of
from fxreg.snapshots import Snapshot
from fxreg.writes import Written

from .marks import slow_but
from .test_mentions import L1, LOUD, QUIET, Reads

_Forward = Callable[..., Any]


@dataclasses.dataclass
class Config:
    """What everybody shares."""

    width: int = 4
    scale: float = 2.0

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.__dict__)


def is_loud(x: Tensor) -> bool:
    """At random, as layers are dropped: no graph holds that."""
    return bool(torch.rand(()) < 2.0 and x.sum() > 100)


def handing(forward: _Forward) -> _Forward:
    def update(self: Any, value: float) -> None:
        self.gain = value

    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor, **more: Any) -> Any:
        if is_loud(x):
            update(self, 3.0)
        return forward(self, x, **more)

    return wrapper


def misleading(forward: _Forward) -> _Forward:
    """The first argument is the configuration."""

    def update(self: Any, value: float) -> None:
        self.gain = value

    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Any:
        if is_loud(x):
            update(self.config, 3.0)
        return forward(self, x)

    return wrapper


class Region(nn.Module):
    """Runs as it is."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.first, self.second, self.config = nn.Linear(4, 4), nn.Linear(4, 4), config

    def run(self, x: Tensor) -> Any:
        y = self.second(self.first(x))
        return y if is_loud(x) else y + getattr(self, "gain", 0.0)


class ToItself(Region):
    def forward(self, x: Tensor) -> Any:
        if is_loud(x):
            self.gain = 3.0
        return self.run(x)


class More(Region):
    def forward(self, x: Tensor) -> Any:
        if is_loud(x):
            self.gain = 3.0
            self.gain += 1.0
        return self.run(x)


class ByName(Region):
    def forward(self, x: Tensor) -> Any:
        for part in ("ga", "ma"):
            if is_loud(x):
                setattr(self, f"{part}in", 3.0)
        return self.run(x)


class Decorated(Region):
    @handing
    def forward(self, x: Tensor) -> Any:
        return self.run(x)


class WithoutGradient(Region):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        if is_loud(x):
            self.gain = 3.0
        return self.run(x)


class ToConfig(Region):
    def forward(self, x: Tensor) -> Any:
        if is_loud(x):
            self.config.gain = 3.0
        return self.run(x)


class ToEither(Region):
    def forward(self, x: Tensor) -> Any:
        (self.config if is_loud(x) else self).gain = 3.0
        return self.run(x)


class Rebound(Region):
    def forward(self, x: Tensor) -> Any:
        y = self.run(x)
        if is_loud(x):
            self = self.config  # noqa: PLW0642
            self.gain = 3.0
        return y


class Nested(Region):
    def forward(self, x: Tensor) -> Any:
        def update(self: Any) -> None:
            self.gain = 3.0

        if is_loud(x):
            update(self.config)
        return self.run(x)


class Misled(Region):
    @misleading
    def forward(self, x: Tensor) -> Any:
        return self.run(x)


class Mixin:
    def update(self) -> None:
        self.gain = 3.0


class Mixed(Mixin, Region):
    """The configuration has the method, too."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.config = config

    def forward(self, x: Tensor) -> Any:
        if is_loud(x):
            (self.config if hasattr(self.config, "update") else self).update()
        return self.run(x)


class Updating(Region):
    """Its method gets the configuration, as no method would."""

    def update(self) -> None:
        self.gain = 3.0

    def forward(self, x: Tensor) -> Any:
        if is_loud(x):
            self.tell()
        return self.run(x)


class OfClass(Updating):
    def tell(self) -> None:
        Updating.update(self.config)


class OfType(Updating):
    def tell(self) -> None:
        type(self).update(self.config)


class OfItsClass(Updating):
    def tell(self) -> None:
        self.__class__.update(self.config)


class ByString(Updating):
    def tell(self) -> None:
        getattr(Updating, "update")(self.config)  # noqa: B009


class ByFunction(Updating):
    def tell(self) -> None:
        self.update.__func__(self.config)  # type: ignore[attr-defined]


HANDLERS = [Updating.update]


class FromContainer(Updating):
    def tell(self) -> None:
        for handle in HANDLERS:
            handle(self.config)


class Root(nn.Module):
    """Takes the configuration apart after the region ran."""

    def __init__(self, kind: type[Region], take: Callable[[Any], dict[str, Any]], config: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = config or Config()
        self.head, self.region, self.take = nn.Linear(4, 4), kind(self.config), take

    def forward(self, x: Tensor) -> Any:
        y = self.region(x)
        found = self.take(self.config)
        return self.head(y) * found["scale"] * len(found)  # one more if there is a gain


def copied(config: Any) -> dict[str, Any]:
    one = copy.copy(config)
    return vars(one)


def copied_deeply(config: Any) -> dict[str, Any]:
    one = another.deepcopy(config)
    return vars(one)


TAKES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "vars": lambda config: vars(config),
    "__dict__": lambda config: config.__dict__,
    "copy": copied,
    "deepcopy": copied_deeply,
    "to_dict": lambda config: config.to_dict(),
}


ELSEWHERE = (
    ToConfig, ToEither, Rebound, Nested, Misled, OfClass, OfType, OfItsClass, ByString, ByFunction, FromContainer,
)  # fmt: skip


def outcome(called: Any) -> list[Any]:
    return [called(x).tolist() for x in (QUIET, LOUD, QUIET)]


def compared(kind: type[Region], take: str, config: Callable[[], Any] = Config) -> list[str]:
    gm = fxreg.transform(Root(kind, TAKES[take], config()), L1, example_inputs=(QUIET,))
    assert outcome(gm) == outcome(Root(kind, TAKES[take], config()))
    return [*fxreg.explain(gm).opaque]


@pytest.mark.parametrize("take", slow_but(["deepcopy"], [*TAKES]))
@pytest.mark.parametrize("kind", slow_but([ToItself, Decorated], [ToItself, More, ByName, Decorated, WithoutGradient]))
def test_a_configuration_is_taken_apart_in_the_graph(kind: type[Region], take: str) -> None:
    assert compared(kind, take) == ["region"]


@pytest.mark.parametrize("take", slow_but(["deepcopy"], [*TAKES]))
@pytest.mark.parametrize("kind", slow_but([ToConfig, Misled], ELSEWHERE))
def test_unless_it_may_be_written(kind: type[Region], take: str) -> None:
    assert compared(kind, take) == [""]


@pytest.mark.parametrize("take", slow_but(["deepcopy"], [*TAKES]))
def test_who_else_has_the_method_may_be_written(take: str) -> None:
    @dataclasses.dataclass
    class Updated(Mixin, Config):
        pass

    assert compared(Mixed, take, Updated) == [""]
    Updated.update = ToItself.forward  # type: ignore[assignment]  # whose first argument it is, too
    assert compared(ToItself, take, Updated) == [""]


@pytest.mark.parametrize("take", ["vars", "deepcopy"])
def test_a_module_in_a_configuration_may_be_written(take: str) -> None:
    class Holding(Root):
        def __init__(self, take: Callable[[Any], dict[str, Any]], held: Callable[[nn.Module], Any]) -> None:
            super().__init__(ToItself, take)
            self.config.held = held(self.region)  # type: ignore[attr-defined]

        def forward(self, x: Tensor) -> Any:
            y = self.region(x)
            held = self.take(self.config)["held"]
            return self.head(y) * len(held if isinstance(held, dict) else vars(held))

    for held in (lambda region: region, vars):
        gm = fxreg.transform(Holding(TAKES[take], held), L1, example_inputs=(QUIET,))
        assert [*fxreg.explain(gm).opaque] == [""]
        assert outcome(gm) == outcome(Holding(TAKES[take], held))


def test_what_has_the_attributes_of_a_module_may_be_written() -> None:
    class Sharing(Root):
        def __init__(self) -> None:
            super().__init__(ToItself, vars)
            vars(self.region).update(vars(self.config))
            self.config.__dict__ = self.region.__dict__

        def forward(self, x: Tensor) -> Any:
            y = self.region(x)
            config = self.config
            return self.head(y) * (config.gain if hasattr(config, "gain") else 1.0)

    gm = fxreg.transform(Sharing(), L1, example_inputs=(QUIET,))
    assert [*fxreg.explain(gm).opaque] == [""]
    assert outcome(gm) == outcome(Sharing())


def test_who_reads_before_is_in_the_graph_whatever_others_do() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            config = Config()
            self.before, self.region, self.after = Reads(config), ToConfig(config), Reads(config)

        def forward(self, x: Tensor) -> Any:
            return self.after(self.before(x) + self.region(x))

    gm = fxreg.transform(Both(), L1, example_inputs=(QUIET,))
    assert {*fxreg.explain(gm).opaque} == {"region", "after"}
    assert outcome(gm) == outcome(Both())


@pytest.mark.parametrize(
    ("body", "elsewhere"),
    [
        ("self.gain = 1", False),
        ("self.gain += x", False),
        ("del self.gain", False),
        ("setattr(self, 'gain', 1)", False),
        ("x, self.gain = y", False),
        ("[lambda: self for y in x]; self.gain = 1", False),
        ("x.gain = 1", True),
        ("self.x.gain = 1", True),
        ("self.x.gain += 1", True),
        ("(x or self).gain = 1", True),
        ("(x if y else self).gain += 1", True),
        ("setattr(self.x, 'gain', 1)", True),
        ("setattr(x if y else self, 'gain', 1)", True),
        ("self = x; self.gain = 1", True),
        ("for self in x: self.gain = 1", True),
        ("f(lambda self: setattr(self, 'gain', 1))", True),
        ("exec('self.gain = 1')", True),
    ],
)
def test_whose_attributes_code_may_write(body: str, elsewhere: bool) -> None:
    space: dict[str, Any] = {}
    exec(f"def function(self, x, y, f):\n    {body}", space)
    function = space["function"]
    assert Written.by([function], [function]).in_objects().may_be("gain") is elsewhere
    assert Written.by([function], [function]).may_be("gain")
    assert Written.by([function]).in_objects().may_be("gain")


@pytest.mark.parametrize(
    ("call", "hands"),
    [
        ("f(self)", True),
        ("f(self, x, key=g(x))", True),
        ("f(self, *x)", True),
        ("f(self, x, **y)", True),
        ("g(f(self))", True),
        ("f(x, self)", False),
        ("f(self.x)", False),
        ("f(self[x])", False),
        ("f(self or x)", False),
        ("f(x if y else self)", False),
        ("f(*self)", False),
        ("f([self])", False),
        ("f((self, x))", False),
        ("f([self], x)", False),
        ("f(key=self)", False),
        ("f.x(self)", False),
        ("g(f, self)", False),
        ("f(self); g(f)", False),
        ("f(self); (lambda: f(x))()", False),
        ("self = x; f(self)", False),
    ],
)
def test_which_functions_are_handed_a_module(call: str, hands: bool) -> None:
    space: dict[str, Any] = {"functools": functools}
    exec(
        "def inner(self): pass\n"
        "def decorated(forward, f=inner, g=id):\n"
        "    f, g = f, g\n"
        "    @functools.wraps(forward)\n"
        "    def wrapper(self, x=None, y=None):\n"
        f"        {call}\n"
        "    return wrapper\n",
        space,
    )

    class Module(nn.Module):
        @space["decorated"]  # type: ignore[untyped-decorator]
        def forward(self) -> None: ...

    assert (space["inner"] in methods_of(Module)) is hands
    assert Module.forward in methods_of(Module)


def test_which_functions_are_methods() -> None:
    def borrowed(self: Any) -> None: ...

    class Module(Mixin, nn.Module):
        taken = borrowed

        @property
        def level(self) -> float:
            return 1.0

        @staticmethod
        def static(one: Any) -> None: ...

        @classmethod
        def of_class(cls) -> None: ...

        @torch.no_grad()
        def forward(self) -> None: ...

    found = methods_of(Module)
    assert {Module.level.fget, Module.forward.__wrapped__} <= found  # type: ignore[attr-defined]
    assert found.isdisjoint({Mixin.update, borrowed, Module.static, Module.of_class.__func__, nn.Module.__call__})  # type: ignore[attr-defined]


def test_the_dictionary_of_a_module_is_a_modules() -> None:
    for held, expected in ((vars(nn.ReLU()), True), (vars(Config()), False), ([nn.ReLU()], True)):
        assert Snapshot([], also=[held], other_modules=True).has_modules() is expected


def test_functions_that_take_objects_apart_may_come_from_modules_of_any_name() -> None:
    for take in (lambda x: another.deepcopy(x), lambda x: copy.copy(x), lambda x: dataclasses.asdict(x)):
        assert any(saying.takes_all for saying in sayings(take.__code__).values())
    assert not any(saying.takes_all for saying in sayings((lambda x: x.copy()).__code__).values())
