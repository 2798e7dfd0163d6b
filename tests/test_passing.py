"""Whether an argument is passed by position or by name: nobody who could tell is misled."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxreg

L1 = fxreg.Rule(fxreg.l1(0.01))
ROW = torch.ones(2, 4)


def counting(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs) * (1 + len(args))

    return wrapper


def naming(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs) * (5 if "mask" in kwargs else 1)

    return wrapper


def closing(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        count = lambda: 1 + len(args)  # noqa: E731
        return forward(self, *args, **kwargs) * count()

    return wrapper


def passing_on(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return wrapper


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        y = self.linear(x)
        return y if mask is None else y + mask


class Counting(Net):
    forward = counting(Net.forward)


class Naming(Net):
    forward = passing_on(naming(Net.forward))


class Closing(Net):
    forward = closing(Net.forward)


class Calling(Net):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * (1 + len(args))


class Hooked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(lambda module, args: tuple(2 * one for one in args if one is not None))


CALLS: list[Callable[[Any], Any]] = [
    lambda net: net(ROW), lambda net: net(x=ROW), lambda net: net(ROW, ROW), lambda net: net(ROW, mask=ROW),
    lambda net: net(x=ROW, mask=ROW), lambda net: net(ROW, None), lambda net: net(ROW, mask=None),
]  # fmt: skip
EXAMPLES = (None, (ROW,), {"x": ROW}, (ROW, ROW), {"x": ROW, "mask": ROW})


@pytest.mark.parametrize("make", [Counting, Naming, Closing, Calling, Hooked])
@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_call_that_is_told_apart_is_the_models_own_or_refused(make: Any, examples: Any) -> None:
    model = make()
    gm = fxreg.transform(model, L1, example_inputs=examples)
    answered = 0
    for call in CALLS:
        try:
            result = call(gm)
        except fxreg.CaptureError:
            continue
        answered += 1
        torch.testing.assert_close(result, call(model), rtol=0, atol=0)
    assert answered


@pytest.mark.parametrize("make", [Counting, Calling])
def test_it_is_refused_in_compiled_code(make: Any) -> None:
    called: Any = torch.compile(fxreg.transform(make(), L1), backend="eager")
    called(ROW)
    with pytest.raises(Exception, match="Pass them as captured"):
        called(x=ROW)


def test_a_hook_that_comes_later_counts() -> None:
    model = Hooked()
    handle = model.register_forward_hook(lambda module, args, output: output * (1 + len(args)))
    gm = fxreg.transform(model, L1)
    torch.testing.assert_close(gm(ROW), model(ROW), rtol=0, atol=0)
    handle.remove()
    with pytest.raises(fxreg.CaptureError, match="Pass them as captured"):
        gm(x=ROW)


@pytest.mark.parametrize("wrap", [passing_on, torch.enable_grad()])
def test_what_only_passes_arguments_on_cannot_tell(wrap: Any) -> None:
    class Wrapped(Net):
        forward = wrap(Net.forward)

    model = Wrapped()
    gm = fxreg.transform(model, L1)
    torch.testing.assert_close(gm(x=ROW), model(ROW), rtol=0, atol=0)
