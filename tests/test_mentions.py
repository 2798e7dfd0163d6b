"""A module that runs as it is may write what others read: who reads it before, and is asked before the next call, is in
the graph; nobody else is."""

import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxreg
from fxreg.mentions import asked, sayings
from fxreg.writes import Written

from .marks import slow_but

pytestmark = pytest.mark.filterwarnings(  # Dynamo's own, looking at its inputs after a graph break
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)

L1 = fxreg.Rule(fxreg.l1(0.01))
QUIET, LOUD, FAILING = torch.ones(3, 4), torch.full((3, 4), 100.0), torch.full((3, 4), -100.0)


class Config:
    """What everybody shares."""

    gain: Any


class Region(nn.Module):
    """Runs as it is, and may write on loud inputs."""

    def __init__(self, config: Any, write: Callable[[Any], None]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.config, self.write = config, write

    def forward(self, x: Tensor) -> Any:
        if torch.rand(()) < 2.0 and x.sum() > 100:  # at random, as layers are dropped
            self.write(self.config)
        if x.sum() < -100:
            raise ArithmeticError
        return self.second(self.first(x))


def sets(config: Any) -> None:
    config.gain = 3.0


def sets_for_all(config: Any) -> None:
    type(config).gain = 3.0


def deletes(config: Any) -> None:
    if hasattr(config, "gain"):
        del config.gain


def sets_by_name(config: Any) -> None:
    setattr(config, "gain", 3.0)  # noqa: B010


def sets_by_parts(config: Any) -> None:
    for part in ("loss", "gain"):
        setattr(config, f"{part[:2]}in", 3.0)


def sets_elsewhere(config: Any) -> None:
    thread = threading.Thread(target=sets, args=(config,))
    thread.start()
    thread.join()


def counts(config: Any) -> None:
    config.gain = getattr(config, "gain", 1.0) + 1.0


WRITES = (sets, sets_for_all, deletes, sets_by_name, sets_by_parts, sets_elsewhere, counts)


class Root(nn.Module):
    """Reads before the region runs."""

    def __init__(self, write: Callable[[Any], None] = sets, gain: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config: Any = type("Config", (Config,), {})()
        if gain is not None:
            self.config.gain = gain
        self.head = nn.Linear(4, 4)
        self.region = Region(self.config, write)

    def forward(self, x: Tensor) -> Any:
        gain = getattr(self.config, "gain", 1.0)
        return self.head(self.region(x)) * gain


class Asks(Root):
    """Whether it is there, and what it is."""

    def forward(self, x: Tensor) -> Any:
        gain = self.config.gain if hasattr(self.config, "gain") else 1.0
        return self.head(self.region(x)) * gain


class ByKeyword(Root):
    """As `transformers` does it: a keyword, or else what the configuration says, set meanwhile and set back."""

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        gain = kwargs.get("gain", getattr(self.config, "gain", None))
        if gain is not None:
            kept = hasattr(self.config, "gain")
            if kept:
                before = self.config.gain
            self.config.gain = gain
        try:
            output = self.head(self.region(x)) * (1.0 if gain is None else gain)
        finally:
            if gain is not None:
                if kept:
                    self.config.gain = before
                else:
                    del self.config.gain
        return output


class Reads(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.linear, self.config = nn.Linear(4, 4), config

    def forward(self, x: Tensor) -> Any:
        return self.linear(x) * getattr(self.config, "gain", 1.0)


class ByChild(Root):
    """Another module, which has the same configuration, reads it."""

    def __init__(self, write: Callable[[Any], None] = sets, gain: Any = None) -> None:
        super().__init__(write, gain)
        self.reads = Reads(self.config)

    def forward(self, x: Tensor) -> Any:
        y = self.reads(x)
        return self.head(self.region(x)) + y


class Renaming(Config):
    names = {"level": "gain"}  # noqa: RUF012

    def __getattribute__(self, name: str) -> Any:
        if name in super().__getattribute__("names"):
            name = super().__getattribute__("names")[name]
        return super().__getattribute__(name)


class ByClass(Root):
    """The configuration looks after its attributes itself."""

    def __init__(self, write: Callable[[Any], None] = sets, gain: Any = None) -> None:
        super().__init__(write, gain)
        self.config = self.region.config = type("Renamed", (Renaming,), {})()
        if gain is not None:
            self.config.gain = gain


BEFORE = (Root, Asks, ByKeyword, ByChild, ByClass)
STEPS: tuple[Any, ...] = (
    QUIET, LOUD, QUIET, QUIET, FAILING, QUIET, LOUD, lambda model: setattr(model.config, "gain", 5.0), QUIET, LOUD,
    QUIET, lambda model: setattr(model, "config", Config()), QUIET, lambda model: setattr(model.config, "gain", 7.0),
    QUIET,
)  # fmt: skip


def run(called: Any, model: nn.Module, steps: tuple[Any, ...] = STEPS) -> list[Any]:
    """What comes out, step by step; some of them change the model."""
    found = []
    for step in steps:
        if isinstance(step, Tensor):
            try:
                found.append(called(step).tolist())
            except ArithmeticError as error:
                found.append(type(error))
        else:
            step(model)
    return found


@pytest.mark.parametrize("gain", [None, 2.0])
@pytest.mark.parametrize(
    ("kind", "write"),
    slow_but([(Root, sets)], [*((Root, one) for one in WRITES), *((one, sets) for one in BEFORE[1:])]),
)
def test_what_is_read_before_is_in_the_graph_and_asked_before_the_next_call(
    kind: type[Root], write: Callable[[Any], None], gain: float | None
) -> None:
    model = kind(write, gain)
    gm = fxreg.transform(model, L1, example_inputs=(QUIET,))
    if not (kind is ByKeyword and gain is not None):  # which sets it, and reads it afterwards
        assert list(fxreg.explain(gm).opaque) == ["region"]
    assert run(gm, model) == run(again := kind(write, gain), again)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "write", "gain"),
    [(Root, sets, None), (ByClass, sets_for_all, 2.0), (Asks, deletes, 2.0)],
)
def test_so_it_is_in_compiled_code(kind: type[Root], write: Callable[[Any], None], gain: float | None) -> None:
    torch.compiler.reset()
    model = kind(write, gain)
    gm = torch.compile(fxreg.transform(model, L1, example_inputs=(QUIET,)), backend="eager")
    assert run(gm, model) == run(again := kind(write, gain), again)


class After(Root):
    def forward(self, x: Tensor) -> Any:
        y = self.region(x)
        return self.head(y) * getattr(self.config, "gain", 1.0)


class ChildAfter(Root):
    def __init__(self, write: Callable[[Any], None] = sets, gain: Any = None) -> None:
        super().__init__(write, gain)
        self.reads = Reads(self.config)

    def forward(self, x: Tensor) -> Any:
        return self.reads(self.region(x))


class Again(Root):
    """Between two calls of the region."""

    def forward(self, x: Tensor) -> Any:
        for _ in range(2):
            x = self.head(x) * getattr(self.config, "gain", 1.0) + self.region(x)
        return x


class Resumed(Root):
    def forward(self, x: Tensor) -> Any:
        gains = self.gains()
        next(gains)
        y = self.region(x)
        return self.head(y) * next(gains)

    def gains(self) -> Iterator[float]:
        yield 0.0
        yield getattr(self.config, "gain", 1.0)


class Later(Root):
    def forward(self, x: Tensor) -> Any:
        read = lambda: getattr(self.config, "gain", 1.0)  # noqa: E731
        y = self.region(x)
        return self.head(y) * read()


class ByValue(Root):
    key = "gain"

    def forward(self, x: Tensor) -> Any:
        before = getattr(self.config, "gain", 1.0)
        y = self.region(x)
        return self.head(y) * before * getattr(self.config, self.key, 1.0)


class ByParts(Root):
    key = "ai"

    def forward(self, x: Tensor) -> Any:
        before = getattr(self.config, "gain", 1.0)
        y = self.region(x)
        return self.head(y) * before * getattr(self.config, f"g{self.key}n", 1.0)


class ByDictionary(Root):
    key = "gain"

    def forward(self, x: Tensor) -> Any:
        before = getattr(self.config, "gain", 1.0)
        y = self.region(x)
        return self.head(y) * before * self.config.__dict__.get(self.key, 1.0)


class ByVars(Root):
    key = "gain"

    def forward(self, x: Tensor) -> Any:
        before = getattr(self.config, "gain", 1.0)
        y = self.region(x)
        return self.head(y) * before * {**vars(self.config)}.get(self.key, 1.0)


class ByGetter(Root):
    key = "gain"

    def forward(self, x: Tensor) -> Any:
        before = getattr(self.config, "gain", 1.0)
        y = self.region(x)
        return self.head(y) * before * (operator.attrgetter(self.key)(self.config) if before != 1.0 else 1.0)


class ByMethod(Root):
    key = "gain"

    def forward(self, x: Tensor) -> Any:
        before = getattr(self.config, "gain", 1.0)
        y = self.region(x)
        return self.head(y) * before * (object.__getattribute__(self.config, self.key) if before != 1.0 else 1.0)


class ByAlias(ByClass):
    """Under another name, which the configuration takes for this one."""

    def forward(self, x: Tensor) -> Any:
        before = getattr(self.config, "gain", 1.0)
        y = self.region(x)
        return self.head(y) * before * getattr(self.config, "level", 1.0)


class Kept(Root):
    """Before, but nobody knows of what: it is in a list."""

    def __init__(self, write: Callable[[Any], None] = sets, gain: Any = None) -> None:
        super().__init__(write, gain)
        self.configs = [self.config]

    def forward(self, x: Tensor) -> Any:
        gain = getattr(self.configs[len(self.configs) - 1], "gain", 1.0)
        return self.head(self.region(x)) * gain


class SetsBack(Root):
    """It writes, too, and what it reads is not what there was."""

    def forward(self, x: Tensor) -> Any:
        before = getattr(self.config, "gain", 1.0)
        self.config.gain = before + 1.0
        gain = self.config.gain
        self.config.gain = before
        return self.head(self.region(x)) * gain


AFTER = (
    After, ChildAfter, Again, Resumed, Later, ByValue, ByParts, ByDictionary, ByVars, ByGetter, ByMethod, ByAlias, Kept,
    SetsBack,
)  # fmt: skip


@pytest.mark.parametrize("gain", [None, 2.0])
@pytest.mark.parametrize(
    ("kind", "write"), slow_but([(After, sets)], [*((one, sets) for one in AFTER), (ByValue, sets_by_parts)])
)
def test_who_may_read_afterwards_runs_as_it_is(
    kind: type[Root], write: Callable[[Any], None], gain: float | None
) -> None:
    model = kind(write, gain)
    gm = fxreg.transform(model, L1, example_inputs=(QUIET,))
    if gain is not None or kind not in (ByGetter, ByMethod):  # which read only what is there
        assert {"", "reads"} & fxreg.explain(gm).opaque.keys()
    steps = tuple(step for step in STEPS if isinstance(step, Tensor))
    assert run(gm, model, steps) == run(again := kind(write, gain), again, steps)


def test_what_is_not_plain_is_not_compared() -> None:
    def replaces(config: Any) -> None:
        config.gain = [3.0]

    class First(Root):
        def forward(self, x: Tensor) -> Any:
            gain = self.config.gain[0]
            return self.head(self.region(x)) * gain

    model = First(replaces, [2.0])
    gm = fxreg.transform(model, L1, example_inputs=(QUIET,))
    assert "" in fxreg.explain(gm).opaque
    assert run(gm, model, (QUIET, LOUD, QUIET)) == run(again := First(replaces, [2.0]), again, (QUIET, LOUD, QUIET))


def test_what_is_written_at_each_call_keeps_its_reader_whole() -> None:
    """A graph that holds once is of no use."""
    model = Root(counts, 2.0)
    gm = fxreg.transform(model, L1, example_inputs=(LOUD,))
    assert "" in fxreg.explain(gm).opaque
    assert run(gm, model, (LOUD, LOUD, QUIET)) == run(again := Root(counts, 2.0), again, (LOUD, LOUD, QUIET))


def test_local_variables_are_no_attributes() -> None:
    def code(gain: float, **more: Any) -> Any:
        level = gain
        return level, more, getattr(code, "known", None)

    assert set().union(*(saying.names for saying in sayings(code.__code__).values())) == {"getattr"}
    assert asked([code.__code__]) == Written(frozenset({"known"}))
