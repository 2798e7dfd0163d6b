"""What a module that runs as it is writes, and a traced one reads: however either gets there, nobody is misled."""

import itertools
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxreg
from fxreg.writes import Written

from . import settings
from .marks import some

L1 = fxreg.Rule(fxreg.l1(0.01))
ROW = torch.ones(2, 3)


class Shared:
    def __init__(self) -> None:
        self.level = 1.0

    def rise(self) -> None:
        self.level += 1.0

    def get(self) -> float:
        return self.level


class Raising:
    """Does it when it is made."""

    def __init__(self, shared: Shared) -> None:
        shared.level += 1.0


class Helper:
    def rise(self, shared: Shared) -> None:
        shared.level += 1.0

    def get(self, shared: Shared) -> float:
        return shared.level


HELPER = Helper()
FUNCTIONS = {"rise": settings.raise_level, "get": settings.level}


class Writer(nn.Module):
    """Runs as it is."""

    def __init__(self, shared: Shared) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write()
        return x

    def write(self) -> None:
        self.shared.level += 1.0


class WritesByBase(Writer):
    def write(self) -> None:
        super().write()


class WritesByMethod(Writer):
    def write(self) -> None:
        self.shared.rise()


class WritesByModule(Writer):
    def write(self) -> None:
        settings.raise_level(self.shared)


class WritesByImport(Writer):
    def write(self) -> None:
        from .settings import raise_level

        raise_level(self.shared)


class WritesByTable(Writer):
    def write(self) -> None:
        FUNCTIONS["rise"](self.shared)


class WritesByList(Writer):
    def __init__(self, shared: Shared) -> None:
        super().__init__(shared)
        self.functions = [settings.raise_level]

    def write(self) -> None:
        self.functions[0](self.shared)


class WritesByMaking(Writer):
    def write(self) -> None:
        Raising(self.shared)


class WritesByObject(Writer):
    def write(self) -> None:
        HELPER.rise(self.shared)


class WritesByProperty(Writer):
    @property
    def of_shared(self) -> float:
        return self.shared.level

    @of_shared.setter
    def of_shared(self, value: float) -> None:
        self.shared.level = value

    def write(self) -> None:
        self.of_shared += 1.0


class Reader(nn.Module):
    """Can be traced."""

    def __init__(self, shared: Shared) -> None:
        super().__init__()
        self.shared, self.linear = shared, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.read()

    def read(self) -> float:
        return self.shared.level


class ReadsByBase(Reader):
    def read(self) -> float:
        return super().read()


class ReadsByMethod(Reader):
    def read(self) -> float:
        return self.shared.get()


class ReadsByModule(Reader):
    def read(self) -> float:
        return settings.level(self.shared)


class ReadsByTable(Reader):
    def read(self) -> Any:
        return FUNCTIONS["get"](self.shared)


class ReadsByObject(Reader):
    def read(self) -> float:
        return HELPER.get(self.shared)


WRITERS = [Writer, *Writer.__subclasses__()]
READERS = [Reader, *Reader.__subclasses__()]


@pytest.mark.parametrize(("writer", "reader"), some([*itertools.product(WRITERS, READERS)], every=2))
@pytest.mark.parametrize("examples", [None, pytest.param((ROW,), marks=pytest.mark.slow)])
def test_nobody_reads_what_was_written_since(writer: Any, reader: Any, examples: Any) -> None:
    shared = Shared()
    model = nn.Sequential(writer(shared), reader(shared))
    gm = fxreg.transform(model, L1, example_inputs=examples)
    assert shared.level == 1.0
    mine = [gm(ROW) for _ in range(3)]
    shared.level = 1.0
    for one in mine:
        torch.testing.assert_close(one, model(ROW), rtol=0, atol=0)


class Box:
    """No code of its own writes what it holds."""


class WritesByName(nn.Module):
    """Runs as it is, and writes by a name that no code says."""

    parts = ("lev", "el")

    def __init__(self, box: Box) -> None:
        super().__init__()
        self.box = box

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write("".join(self.parts), float(x.sum()))
        return x

    def write(self, name: str, value: float) -> None:
        settings.put(self.box, name, value)


class WritesByParts(WritesByName):
    def write(self, name: str, value: float) -> None:
        setattr(self.box, f"{self.parts[0]}el", value)


class WritesPastClass(WritesByName):
    def write(self, name: str, value: float) -> None:
        object.__setattr__(self.box, name, value)


class WritesIntoDictionary(WritesByName):
    def write(self, name: str, value: float) -> None:
        vars(self.box)[name] = value


class WritesAnother(nn.Module):
    """Says `level`, and writes another attribute."""

    def __init__(self, box: Box) -> None:
        super().__init__()
        self.box = box

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            setattr(self.box, "note", hasattr(self.box, "level"))  # noqa: B010
        return x


class ReadsBox(nn.Module):
    def __init__(self, box: Any) -> None:
        super().__init__()
        self.box, self.linear = box, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.box.level


@pytest.mark.parametrize("writer", [WritesByName, WritesByParts, WritesPastClass, WritesIntoDictionary])
@pytest.mark.parametrize("examples", [None, (ROW,)])
def test_nobody_reads_what_was_written_by_name(writer: Any, examples: Any) -> None:
    box: Any = Box()
    box.level = 1.0
    model = nn.Sequential(writer(box), ReadsBox(box))
    gm = fxreg.transform(model, L1, example_inputs=examples)
    for factor in (2.0, 3.0):
        box.level = 1.0
        mine = gm(ROW * factor)
        box.level = 1.0
        torch.testing.assert_close(mine, model(ROW * factor), rtol=0, atol=0)


def test_an_attribute_set_by_its_name_is_no_other() -> None:
    box: Any = Box()
    box.level = 1.0
    model = nn.Sequential(WritesAnother(box), ReadsBox(box))
    gm = fxreg.transform(model, L1)
    assert [*fxreg.explain(gm).opaque] == ["0"]
    torch.testing.assert_close(gm(ROW), model(ROW), rtol=0, atol=0)


class Distance:
    """What a layer of torch's own is given to run."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.shared.level += 1.0
        return (x - y).abs().sum(-1)


class ReadsAfterLayer(nn.Module):
    def __init__(self, shared: Shared, layer: nn.Module) -> None:
        super().__init__()
        self.shared, self.layer, self.fc = shared, layer, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return self.layer(y, x, -x) * self.shared.level


@pytest.mark.parametrize("examples", [None, (ROW,)])
def test_what_a_layer_of_torchs_own_keeps_may_write(examples: Any) -> None:
    shared = Shared()
    layer = nn.TripletMarginWithDistanceLoss(distance_function=Distance(shared))
    model = ReadsAfterLayer(shared, layer)
    gm = fxreg.transform(model, L1, example_inputs=examples)
    for _ in range(2):
        shared.level = 1.0
        expected = model(ROW)
        shared.level = 1.0
        torch.testing.assert_close(gm(ROW), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("x.gain = 1", "gain"),
        ("setattr(x, 'gain', 1)", "gain"),
        ("setattr(x.y[0].z(1, 'shift'), 'gain', f(1, 'shift', x))", "gain"),
        ("delattr(x, 'gain')", "gain"),
        ("setattr(x, f'{y}ain', 1)", "gain main"),
        ("setattr(x, f'g{y + 1!r:>{z}}n', 'shift')", "gain green"),
        ("setattr(x, f'{y}', 1)", "gain green main shift"),
        ("setattr(x, 'ga' + y, 1)", "gain green main shift"),
        ("setattr(x, y, 'gain')", "gain green main shift"),
        ("setattr(x, 'gain' if y else z, 1)", "gain green main shift"),
        ("setattr(*x)", "gain green main shift"),
        ("f(setattr, x, 'gain')", "gain green main shift"),
        ("put = setattr; put(x, 'gain', 1)", "gain green main shift"),
        ("import builtins; builtins.setattr(x, 'gain', 1)", "gain green main shift"),
        ("getattr(y, 'setattr')(x, 'gain', 1)", "gain green main shift"),
        ("x.__dict__.update(gain=1)", "gain green main shift"),
        ("(lambda: setattr(x, y, 1))()", "gain green main shift"),
        ("y.gain", ""),
    ],
)
def test_names_that_code_may_write(body: str, expected: str) -> None:
    space: dict[str, Any] = {}
    exec(f"def function(x, y, z, f):\n    {body}", space)
    written = Written.by([space["function"]])
    assert written.among(["gain", "green", "main", "shift"]) == {*expected.split()}


def shift(model: nn.Module) -> None:
    """Has the name of an attribute, and nothing to do with it."""
    for parameter in model.parameters():
        parameter.grad = None


layers: list[int] = []
"""Likewise."""


def test_a_global_container_is_not_the_attribute_of_its_name() -> None:
    class Layered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3)])

        def forward(self, x: Tensor) -> Tensor:
            found = []
            for layer in self.layers:
                found.append(layer(x))
            return torch.cat(found)

    class Counted(Layered):
        def forward(self, x: Tensor) -> Tensor:
            layers.append(1)
            return self.layers[0](x)

    assert not fxreg.explain(fxreg.transform(Layered(), L1)).opaque
    assert "changes a global container" in fxreg.explain(fxreg.transform(Counted(), L1)).opaque[""]


def test_a_global_function_is_not_the_attribute_of_its_name() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    class Cleared(Shifted):
        def forward(self, x: Tensor) -> Tensor:
            shift(self)
            return x + self.shift

    assert not fxreg.explain(fxreg.transform(Shifted(), L1)).opaque
    assert "shift writes the attribute 'grad'" in fxreg.explain(fxreg.transform(Cleared(), L1)).opaque[""]


PACKAGE = """
import random

REGISTRY = {"k": 2.0}

class Filling(Layer):
    def forward(self, x):
        found = []
        found.append(REGISTRY["k"])
        return self.fc(x) if random.random() < 2.0 else x * found[0]

class Reading(Layer):
    def forward(self, x):
        return self.fc(x) * REGISTRY["k"]
"""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)


@pytest.mark.parametrize("examples", [None, (ROW,)])
@pytest.mark.parametrize(("folder", "opaque"), [("site-packages", {"0"}), ("src", {"0", "1"})])
def test_what_a_package_keeps_is_constant(
    folder: str, opaque: set[str], examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads it beside what runs as it is, and names it too, is in the graph; not so with the user's own."""
    package = types.ModuleType("a_package")
    package.__file__ = f"/{folder}/a_package.py"
    monkeypatch.setitem(sys.modules, package.__name__, package)
    vars(package)["Layer"] = Layer
    exec(compile(PACKAGE, package.__name__, "exec"), vars(package))
    model = nn.Sequential(package.Filling(), package.Reading())
    gm = fxreg.transform(model, L1, example_inputs=examples)
    assert {*fxreg.explain(gm).opaque} == opaque
    for x in (ROW, -ROW):
        torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)
