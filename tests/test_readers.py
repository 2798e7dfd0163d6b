"""Who reads what a module that runs as it is may have written: however it reads, and whatever keeps it."""

import collections
import contextlib
import contextvars
import copy
import dataclasses
import operator
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxreg

from . import settings
from .marks import slow_but
from .settings import KEPT as RENAMED
from .settings import TABLE as SAME
from .test_mentions import L1, LOUD, QUIET, Region

KEY = "gain"
GETTER = operator.attrgetter(KEY)
GLOBALS = types.SimpleNamespace(gain=2.0)
BOX = [2.0]
VARIABLE = contextvars.ContextVar("VARIABLE", default=2.0)


class After(nn.Module):
    def __init__(self, config: Any, write: Callable[[Any], None], read: Callable[[Any], float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config, self.read = config, read
        self.head, self.region = nn.Linear(4, 4), Region(config, write)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.region(x)) * self.read(self.config)


class Before(After):
    def forward(self, x: Tensor) -> Any:
        gain = self.read(self.config)
        return self.head(self.region(x)) * gain


# What keeps it.


class Plain:
    gain: Any


class InClass:
    gain = 2.0


class Inherited(InClass):
    pass


class Louder(InClass):
    gain = 3.0


@dataclasses.dataclass
class Data:
    gain: float = 2.0


class Slotted:
    __slots__ = (KEY,)


class Managed:
    def __init__(self) -> None:
        self._gain = 2.0

    @property
    def gain(self) -> float:
        return self._gain

    @gain.setter
    def gain(self, value: float) -> None:
        self._gain = value


class Computed:
    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "values":
            raise AttributeError(name)
        return self.values.get(name, 2.0)


# Who writes it.


def sets(config: Any) -> None:
    config.gain = 3.0


def sets_by_name(config: Any) -> None:
    setattr(config, "gain", 3.0)  # noqa: B010


def sets_by_value(config: Any) -> None:
    for name in ("level", KEY):
        setattr(config, name, 3.0)


def sets_in_dictionary(config: Any) -> None:
    config.__dict__["gain"] = 3.0


def sets_past_class(config: Any) -> None:
    object.__setattr__(config, "gain", 3.0)


def sets_for_all(config: Any) -> None:
    type(config).gain = 3.0


def sets_elsewhere(config: Any) -> None:
    thread = threading.Thread(target=sets, args=(config,))
    thread.start()
    thread.join()


def sets_by_code(config: Any) -> None:
    exec("config.gain = 3.0")


def becomes_another(config: Any) -> None:
    config.__class__ = Louder


def fills(config: Any) -> None:
    config.values["gain"] = 3.0


def sets_global(config: Any) -> None:
    GLOBALS.gain = 3.0


def sets_variable(config: Any) -> None:
    VARIABLE.set(3.0)


def fills_global(config: Any) -> None:
    BOX[0] = 3.0


def fills_module(config: Any) -> None:
    settings.TABLE["k"] = 3.0


def fills_renamed(config: Any) -> None:
    SAME["k"] = 3.0


def fills_variable(config: Any) -> None:
    own = RENAMED.own
    own["k"] = 3.0


def fills_class(config: Any) -> None:
    settings.Kept.of_class["k"] = 3.0


# Who reads it.


def plainly(config: Any) -> float:
    return config.gain  # type: ignore[no-any-return]


def by_default(config: Any) -> float:
    return getattr(config, "gain", 2.0)


def by_asking(config: Any) -> float:
    return config.gain if hasattr(config, "gain") else 2.0


def by_trying(config: Any) -> float:
    try:
        return config.gain  # type: ignore[no-any-return]
    except AttributeError:
        return 2.0


def by_suppressing(config: Any) -> float:
    with contextlib.suppress(AttributeError):
        return config.gain  # type: ignore[no-any-return]
    return 2.0


def by_value(config: Any) -> float:
    return getattr(config, KEY, 2.0)


def by_mapping(config: Any) -> float:
    return next(map(getattr, [config], ["gain"], [2.0]))


def by_matching(config: Any) -> float:
    match config:
        case Plain(gain=found) | InClass(gain=found):
            return found  # type: ignore[no-any-return]
    return 2.0


def by_getter(config: Any) -> float:
    return GETTER(config) if hasattr(config, KEY) else 2.0


def by_dictionary(config: Any) -> float:
    return config.__dict__.get(KEY, 2.0)  # type: ignore[no-any-return]


def by_vars(config: Any) -> float:
    return next((value for name, value in vars(config).items() if name == KEY), 2.0)


def by_adding(config: Any) -> float:
    return sum(vars(config).values()) + 2.0


def by_counting(config: Any) -> float:
    return 2.0 + ("gain" in dir(config))


def by_copying(config: Any) -> float:
    return {**copy.copy(config).__dict__}.get(KEY, 2.0)


def by_tuple(config: Any) -> float:
    return dataclasses.astuple(config)[0]  # type: ignore[no-any-return]


def by_replacing(config: Any) -> float:
    return getattr(dataclasses.replace(config), KEY)


def globally(config: Any) -> float:
    return GLOBALS.gain  # type: ignore[no-any-return]


def by_variable(config: Any) -> float:
    return VARIABLE.get()


def globally_in_list(config: Any) -> float:
    return BOX[0]


def by_module(config: Any) -> float:
    return settings.TABLE["k"]


def renamed(config: Any) -> float:
    return SAME["k"]


def of_object(config: Any) -> float:
    return settings.KEPT.own["k"]


def of_class(config: Any) -> float:
    return RENAMED.of_class["k"]


CASES = [
    *((Plain, sets, one) for one in (
        by_default, by_asking, by_trying, by_suppressing, by_value, by_mapping, by_matching, by_getter, by_dictionary,
        by_vars, by_adding, by_counting, by_copying,
    )),
    *((Plain, one, by_default) for one in (
        sets_by_name, sets_by_value, sets_in_dictionary, sets_past_class, sets_for_all, sets_elsewhere, sets_by_code
    )),
    (Plain, sets_by_value, by_trying), (Plain, sets_in_dictionary, by_trying),
    *((InClass, one, plainly) for one in (
        sets, sets_by_name, sets_by_value, sets_in_dictionary, sets_for_all, sets_elsewhere, becomes_another
    )),
    (InClass, sets, by_matching), (InClass, sets, by_getter), (InClass, sets_for_all, by_getter),
    (Inherited, sets, plainly), (Inherited, sets_for_all, plainly),
    (Data, sets, by_tuple), (Data, sets, by_replacing), (Data, sets, by_vars),
    (Slotted, sets, by_default), (Slotted, sets_by_name, by_trying),
    (Managed, sets, plainly), (Managed, sets_by_name, plainly), (Managed, sets_by_value, by_getter),
    (Computed, sets, plainly), (Computed, sets_by_value, plainly), (Computed, fills, plainly),
    (collections.Counter, sets, by_default),
    (Plain, sets_global, globally), (Plain, sets_variable, by_variable), (Plain, fills_global, globally_in_list),
    (Plain, fills_module, renamed), (Plain, fills_renamed, by_module), (Plain, fills_renamed, renamed),
    (Plain, fills_variable, of_object), (Plain, fills_class, of_class),
]  # fmt: skip
QUICK = [(Plain, sets, by_default), (Plain, sets, by_trying), (InClass, sets, plainly)]


@pytest.fixture(autouse=True)
def set_back() -> Iterator[None]:
    """Classes and global variables are as they were, afterwards and whenever this is called."""
    yield
    reset()


def reset() -> None:
    VARIABLE.set(2.0)
    InClass.gain = GLOBALS.gain = BOX[0] = 2.0
    settings.TABLE["k"] = settings.KEPT.own["k"] = settings.Kept.of_class["k"] = 2.0
    for kind in (Plain, Inherited):
        if KEY in vars(kind):
            del kind.gain


@pytest.mark.parametrize(("make", "write", "read"), slow_but(QUICK, CASES))
@pytest.mark.parametrize("examples", [None, (QUIET,)])
def test_who_may_read_afterwards_runs_as_it_is(
    make: Callable[[], Any], write: Callable[[Any], None], read: Callable[[Any], float], examples: Any
) -> None:
    for kind in (After, Before) if write is sets_for_all else (After,):
        model, twin = kind(make(), write, read), kind(make(), write, read)
        gm = fxreg.transform(model, L1, example_inputs=examples)
        assert kind is Before or "" in fxreg.explain(gm).opaque
        found = []
        for called in (gm, twin):
            reset()
            found.append([called(x).tolist() for x in (QUIET, LOUD, QUIET, QUIET)])
        assert found[0] == found[1]
        assert found[1][1] != found[1][0] != found[1][2]
