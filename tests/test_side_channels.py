"""What a module that runs as it is writes, and a traced one reads: however either gets there, nobody is misled."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxreg

from . import settings

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


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("reader", READERS)
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
