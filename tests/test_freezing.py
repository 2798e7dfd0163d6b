"""Values as plain data: whatever two differ in shows, and copies are alike."""

import array
import collections
import copy
import ctypes
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import operator
import pathlib
import pickle
import random
import re
import types
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend

import fxreg
from fxreg.freezing import frozen
from fxreg.structure import alike
from fxreg.witnesses import Witness

from .test_outside import L1, ROW, Layer


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Bits(enum.Flag):
    ONE = 1
    TWO = 2


class Open(enum.IntFlag, boundary=enum.KEEP):
    ONE = 1


class Text(str):
    __slots__ = ()


class Number(int):
    pass


class Real(float):
    pass


class Day(datetime.date):
    pass


class Pair(NamedTuple):
    a: int
    b: int


@dataclasses.dataclass(slots=True)
class Slotted:
    a: int


class Plain:
    def __init__(self, a: Any) -> None:
        self.a = a

    def method(self) -> Any:
        return self.a


def adding(n: int) -> Callable[[int], int]:
    return lambda x: x + n


def marked(n: int) -> Callable[[], None]:
    def function() -> None: ...

    function.n = n  # type: ignore[attr-defined]
    return function


def nested(depth: int, value: int) -> Any:
    return [nested(depth - 1, value)] if depth else value


def shared(is_one: bool) -> list[list[int]]:
    inner = [1]
    return [inner, inner if is_one else [1]]


PAIRS: dict[str, tuple[Any, Any]] = {
    "bool, int": (True, 1),
    "int, float": (1, 1.0),
    "zeros": (0.0, -0.0),
    "attrgetter": (operator.attrgetter("a"), operator.attrgetter("b")),
    "itemgetter": (operator.itemgetter(0), operator.itemgetter(1)),
    "methodcaller": (operator.methodcaller("relu"), operator.methodcaller("tanh")),
    "methodcaller, keyword": (operator.methodcaller("sum", dim=0), operator.methodcaller("sum", dim=1)),
    "pattern": (re.compile("a"), re.compile("b")),
    "timedelta": (datetime.timedelta(1), datetime.timedelta(2)),
    "date": (datetime.date(2020, 1, 1), datetime.date(2020, 1, 2)),
    "subclass of date": (Day(2020, 1, 1), Day(2020, 1, 2)),
    "Decimal": (decimal.Decimal("1"), decimal.Decimal("2")),
    "Fraction": (fractions.Fraction(1, 2), fractions.Fraction(1, 3)),
    "range": (range(2), range(3)),
    "slice": (slice(0, 2), slice(0, 3)),
    "bytearray": (bytearray(b"a"), bytearray(b"b")),
    "array": (array.array("f", [1]), array.array("f", [2])),
    "memoryview": (memoryview(b"a"), memoryview(b"b")),
    "UUID": (uuid.UUID(int=1), uuid.UUID(int=2)),
    "path": (pathlib.PurePath("a"), pathlib.PurePath("b")),
    "memory format": (torch.channels_last, torch.contiguous_format),
    "layout": (torch.strided, torch.sparse_coo),
    "finfo": (torch.finfo(torch.float32), torch.finfo(torch.float16)),
    "enumeration of C++": (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION),
    "NumPy's dtype": (np.dtype("f4"), np.dtype("f8")),
    "NumPy's float": (np.float64(1), np.float64(2)),
    "NumPy's array": (np.zeros(2), np.ones(2)),
    "NumPy's array of objects": (np.array([1, "a"], dtype=object), np.array([2, "a"], dtype=object)),
    "enum": (Color.RED, Color.BLUE),
    "flag without a name": (Open(8), Open(16)),
    "flag": (Bits.ONE, Bits.ONE | Bits.TWO),
    "subclass of str": (Text("a"), Text("b")),
    "subclass of int": (Number(1), Number(2)),
    "subclass of float": (Real(1), Real(2)),
    "named tuple": (Pair(1, 2), Pair(1, 3)),
    "slots": (Slotted(1), Slotted(2)),
    "attributes": (Plain(1), Plain(2)),
    "namespace": (types.SimpleNamespace(a=1), types.SimpleNamespace(a=2)),
    "method": (Plain(1).method, Plain(2).method),
    "dict's method": ({"a": 1}.get, {"a": 2}.get),
    "list's method": ([1].__getitem__, [2].__getitem__),
    "object's method": (Plain(1).__getattribute__, Plain(2).__getattribute__),
    "float's method": ((2.0).__mul__, (3.0).__mul__),
    "partial": (functools.partial(pow, 2), functools.partial(pow, 3)),
    "closure": (adding(1), adding(2)),
    "default": ((lambda a=1: a), (lambda a=2: a)),
    "function's attribute": (marked(1), marked(2)),
    "cached function": (functools.lru_cache(adding(1)), functools.lru_cache(adding(2))),
    "static method": (staticmethod(adding(1)), staticmethod(adding(2))),
    "property": (property(adding(1)), property(adding(2))),  # type: ignore[arg-type]
    "mapping proxy": (types.MappingProxyType({"a": 1}), types.MappingProxyType({"a": 2})),
    "Counter": (collections.Counter("a"), collections.Counter("b")),
    "default of a dict": (collections.defaultdict(int), collections.defaultdict(float)),
    "length of a deque": (collections.deque([1], 2), collections.deque([1], 3)),
    "ChainMap": (collections.ChainMap({"a": 1}), collections.ChainMap({"a": 2})),
    "order of a dict": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "values of a dict": ({"a": 1}.values(), {"a": 2}.values()),
    "set": ({1}, {2}),
    "class": (Plain, Slotted),
    "function": (torch.relu, torch.tanh),
    "method of a class": (torch.Tensor.relu, torch.Tensor.tanh),
    "operator": (int.__add__, int.__mul__),
    "generic alias": (list[int], list[float]),
    "deep inside": (nested(40, 1), nested(40, 2)),
    "one or two": (shared(True), shared(False)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_whatever_two_values_differ_in_shows(name: str) -> None:
    one, other = PAIRS[name]
    assert alike(frozen(one), frozen(one))
    assert not alike(frozen(one), frozen(other))
    witness, then = Witness(), frozen(one)
    assert witness.agrees("", one, then)
    assert not witness.agrees("", other, then)


class Named(enum.Enum):
    ONE = 1

    def __init__(self, value: int) -> None:
        self.gain = 1.0


MOVED: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "records": (lambda: np.rec.array([(1.0, 1)], dtype=[("v", float), ("k", int)]), lambda one: one.v.fill(3.0)),
    "masked": (lambda: np.ma.array([1.0, 2.0]), lambda one: one.__setitem__(0, np.ma.masked)),
    "number of C": (lambda: ctypes.c_double(1.0), lambda one: setattr(one, "value", 3.0)),
    "default": (lambda: collections.defaultdict(int), lambda one: setattr(one, "default_factory", float)),
    "member": (lambda: Named.ONE, lambda one: setattr(one, "gain", one.gain + 1.0)),
    "object": (lambda: types.SimpleNamespace(a=1), lambda one: setattr(one, "a", 2)),
    "inside": (lambda: [{"k": Plain(1)}], lambda one: setattr(one[0]["k"], "a", 2)),
}


@pytest.mark.parametrize("name", MOVED)
def test_what_changes_in_place_is_seen(name: str) -> None:
    make, move = MOVED[name]
    one, witness = make(), Witness()
    then = frozen(one)
    assert witness.agrees("", one, then)
    assert witness.agrees("", one, then)
    move(one)
    assert not witness.agrees("", one, then)


NOT_COPIED = {"memoryview", "values of a dict", "finfo", "static method", "mapping proxy"}


@pytest.mark.parametrize("name", [name for name in PAIRS if name not in NOT_COPIED])
def test_a_copy_is_frozen_alike(name: str) -> None:
    for value in PAIRS[name]:
        with_others = [value, {"k": (value, [value])}]
        assert alike(frozen(copy.deepcopy(with_others)), frozen(with_others))
        assert alike(pickle.loads(pickle.dumps(frozen(with_others))), frozen(with_others))


@pytest.mark.parametrize(
    ("make", "move"),
    [
        (random.Random, lambda one: one.random()),
        (np.random.default_rng, lambda one: one.random()),
        (np.random.RandomState, lambda one: one.rand()),
        (torch.Generator, lambda one: torch.rand(1, generator=one)),
    ],
)
def test_of_random_generators_only_the_type_counts(make: Callable[[], Any], move: Callable[[Any], object]) -> None:
    one = make()
    then = frozen(one)
    move(one)
    assert alike(frozen(one), then)


def test_a_class_may_have_members_of_its_own() -> None:
    class Club:
        __members__ = ("a",)

        def __init__(self, n: int) -> None:
            self.n = n

    assert not alike(frozen(Club(1)), frozen(Club(2)))


def test_what_leads_to_itself_ends() -> None:
    one = Plain([])
    one.a.append(one)
    other = Plain([])
    other.a.append(Plain(other.a))
    assert alike(frozen(one), frozen(copy.deepcopy(one)))
    assert not alike(frozen(one), frozen(other))


class Keeping(Layer):
    """Reads an attribute, and does with it what `use` says."""

    def __init__(self, kept: Any, use: Callable[[torch.Tensor, Any], torch.Tensor]) -> None:
        super().__init__()
        self.kept, self.use = kept, use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(self.linear(x), self.kept)


USES: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "slice": lambda y, window: y[..., window],
    "range": lambda y, steps: y * sum(steps),
    "methodcaller": lambda y, act: act(y),
    "subclass of str": lambda y, mode: y * 2 if mode == "a" else y,
    "subclass of float": lambda y, scale: y * float(scale),
    "timedelta": lambda y, time: y * time.days,
    "dict's method": lambda y, get: y * get("a"),
    "float's method": lambda y, scaled: y + scaled(2.0),
    "memory format": lambda y, kind: y * 2 if kind is torch.channels_last else y,
}


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("examples", [None, (ROW,)])
@pytest.mark.parametrize("name", USES)
def test_another_value_of_an_attribute_is_noticed(name: str, examples: Any, is_compiled: bool) -> None:
    torch.compiler.reset()
    before, after = PAIRS[name]
    model = nn.Sequential(Keeping(before, USES[name]))
    gm = fxreg.transform(model, L1, example_inputs=examples)
    called = torch.compile(gm, backend="eager") if is_compiled else gm
    torch.testing.assert_close(called(ROW), model(ROW), rtol=0, atol=0)
    model[0].kept = after
    try:
        output = called(ROW)
    except fxreg.CaptureError:
        return
    torch.testing.assert_close(output, model(ROW), rtol=0, atol=0)
