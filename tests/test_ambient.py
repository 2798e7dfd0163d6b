"""What a forward asks of the process is asked at every call: clocks, files, loggers, switches of torch's."""

import functools
import gc
import logging
import os
import sys
import threading
import time as clock
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.backends import mkldnn
from torch.backends.cuda import flash_sdp_enabled as flashes

import fxreg
from fxreg.ambient import ambient, is_answer

LOG = logging.getLogger("fxreg.tests.ambient")
BOX = types.SimpleNamespace(value=1)
KEPT = functools.partial(lambda box: box.value, BOX)
FILE = Path(os.devnull)


def write(text: str) -> None:
    FILE.write_text(text)


Setting = tuple[Callable[[], Any], Callable[[bool], object]]
SETTINGS: dict[str, Setting] = {
    "an attribute of torch.backends": (
        lambda: torch.backends.mkldnn.enabled,
        lambda on: setattr(mkldnn, "enabled", on),
    ),
    "a module of torch.backends": (lambda: mkldnn.enabled, lambda on: setattr(mkldnn, "enabled", on)),
    "a function of torch.backends": (lambda: flashes(), lambda on: torch.backends.cuda.enable_flash_sdp(on)),
    "what is behind it": (lambda: torch._C._get_mkldnn_enabled(), lambda on: setattr(mkldnn, "enabled", on)),
    "a warning mode": (lambda: torch.is_warn_always_enabled(), lambda on: torch.set_warn_always(on)),
    "the debug mode": (
        lambda: torch.get_deterministic_debug_mode(),
        lambda on: torch.set_deterministic_debug_mode(int(on)),
    ),
    "anomaly detection": (
        lambda: torch.is_anomaly_enabled(),
        lambda on: torch.autograd.set_detect_anomaly(on, check_nan=False),
    ),
    "a logger": (
        lambda: LOG.isEnabledFor(logging.INFO),
        lambda on: LOG.setLevel(logging.INFO if on else logging.ERROR),
    ),
    "a file": (lambda: bool(FILE.read_text()), lambda on: write("1" if on else "")),
    "the size of a file": (lambda: os.stat(FILE).st_size > 0, lambda on: write("1" if on else "")),
    "the arguments of the program": (lambda: sys.argv[-1] == "on", lambda on: sys.argv.append("on" if on else "off")),
    "the collector": (lambda: gc.isenabled(), lambda on: gc.enable() if on else gc.disable()),
    "a thread": (
        lambda: threading.current_thread().name == "on",
        lambda on: setattr(threading.current_thread(), "name", "on" if on else "off"),
    ),
    "numpy's switches": (
        lambda: np.geterr()["divide"] == "warn",
        lambda on: np.seterr(divide="warn" if on else "ignore"),
    ),
    "what a partial function keeps": (lambda: KEPT() == 2, lambda on: setattr(BOX, "value", 1 + on)),
}


@pytest.fixture(autouse=True)
def _as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(globals(), "FILE", tmp_path / "value")
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(threading.current_thread(), "name", "main")
    FILE.write_text("")
    before = {name: bool(asked()) for name, (asked, _) in SETTINGS.items()}
    yield
    for name, (_, put) in SETTINGS.items():
        put(before[name])


class Asks(nn.Module):
    def __init__(self, asked: Callable[[], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.asked = asked


class Branches(Asks):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * 2 if self.asked() else self.fc(x) * 3


class Multiplies(Asks):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (1 + bool(self.asked()))


@pytest.mark.parametrize("is_recorded", [False, True], ids=["traced", "recorded"])
@pytest.mark.parametrize("kind", [Branches, Multiplies])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_answer_is_that_of_the_call(name: str, kind: type[Asks], is_recorded: bool) -> None:
    asked, put = SETTINGS[name]
    put(False)
    model, x = kind(asked), torch.randn(2, 3)
    gm = fxreg.transform(model, [fxreg.Rule(fxreg.l1(0.1))], example_inputs=(x,) if is_recorded else None)
    first = model(x)
    assert torch.equal(gm(x), first)
    put(True)
    assert not torch.equal(model(x), first)
    try:
        result = gm(x)
    except fxreg.CaptureError:
        return
    assert torch.equal(result, model(x))


# However the forward has what it asks: no global variable of its own names it.


class Kept:
    """An object that answers, and holds who does."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer = answer

    def says(self) -> Any:
        return self.answer()


def closed_over(answer: Callable[[], Any]) -> nn.Module:
    class Closed(Asks):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * 2 if answer() else self.fc(x) * 3

    return Closed(bool)


def as_default(answer: Callable[[], Any]) -> nn.Module:
    class Defaulting(Asks):
        def forward(self, x: Tensor, *, asked: Callable[[], Any] = answer) -> Tensor:
            return self.fc(x) * 2 if asked() else self.fc(x) * 3

    return Defaulting(bool)


def of_the_class(answer: Callable[[], Any]) -> nn.Module:
    class Classed(Asks):
        answer_of_all = staticmethod(answer)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * 2 if self.answer_of_all() else self.fc(x) * 3

    return Classed(bool)


class InDict(Asks):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * 2 if self.asked["it"]() else self.fc(x) * 3  # type: ignore[index]


class InObject(Asks):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * 2 if self.asked.says() else self.fc(x) * 3  # type: ignore[attr-defined]


WAYS: dict[str, Callable[[Callable[[], Any]], nn.Module]] = {
    "an attribute": Branches,
    "a closure": closed_over,
    "a default": as_default,
    "the class": of_the_class,
    "a dict": lambda answer: InDict({"it": answer}),  # type: ignore[arg-type]
    "an object": lambda answer: InObject(Kept(answer)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("is_recorded", [False, True], ids=["traced", "recorded"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["the collector", "a file"])
def test_however_the_forward_reaches_it(way: str, name: str, is_recorded: bool) -> None:
    _, put = SETTINGS[name]
    answer: Callable[[], Any] = gc.isenabled if name == "the collector" else FILE.read_text
    put(False)
    model, x = WAYS[way](answer), torch.randn(2, 3)
    gm = fxreg.transform(model, [fxreg.Rule(fxreg.l1(0.1))], example_inputs=(x,) if is_recorded else None)
    put(True)
    assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize("is_recorded", [False, True], ids=["traced", "recorded"])
def test_a_forward_that_prints_goes_on_printing(is_recorded: bool, capsys: pytest.CaptureFixture[str]) -> None:
    class Prints(Asks):
        def forward(self, x: Tensor) -> Tensor:
            print("here")
            return self.fc(x)

    x = torch.randn(2, 3)
    gm = fxreg.transform(Prints(bool), [], example_inputs=(x,) if is_recorded else None)
    capsys.readouterr()
    gm(x)
    assert capsys.readouterr().out == "here\n"


class Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.start = clock.perf_counter()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (clock.perf_counter() - self.start)


def test_a_clock_goes_on() -> None:
    model, x = Late(), torch.randn(2, 3)
    gm = fxreg.transform(model, [])
    assert not torch.equal(gm(x), gm(x))
    with pytest.raises(fxreg.VerifyError):  # no two calls agree
        fxreg.transform(model, [], example_inputs=(x,))


def test_names_of_attributes_are_not_questions() -> None:
    """A layer may be called like a module of Python's, as long as nothing loads the module."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.time(x) + self.logging.level

    assert ambient(forward.__code__, globals()) is None


def test_what_packages_keep_is_constant_and_their_clocks_are_not() -> None:
    def forward(x: Tensor) -> Tensor:
        return x * torch.backends.mkldnn.enabled

    def timed(x: Tensor) -> Tensor:
        return x * clock.time()

    package = {**vars(np), "torch": torch, "clock": clock}
    assert ambient(forward.__code__, globals()) is not None
    assert ambient(forward.__code__, package) is None
    assert ambient(timed.__code__, package) is not None


def test_what_computes_is_no_question() -> None:
    found = [getattr(space, name) for space in (torch.nn.functional, torch.linalg, torch.fft) for name in dir(space)]
    named = [one for one in found if getattr(one, "__name__", "_")[0] != "_" and not isinstance(one, types.ModuleType)]
    asks = {one.__name__ for one in named if is_answer(one, None)}
    assert not {one for one in asks if not one.startswith("has_torch_function")}
    assert torch.nn.functional.gelu in named
