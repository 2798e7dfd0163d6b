"""What a module that runs as it is does to the modules inside it: their activations are penalized, or it is an error.

The reference calls the inner module itself, as the forward does, and penalizes what it gets.
"""

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fxreg

from .reference import assert_same

pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo
]
S = 0.37
Way = Callable[[Any, Tensor], Tensor]
HEARD: dict[str, Way] = {}
"""Ways to call an inner module once, which are heard."""
REFUSED: dict[str, tuple[Way, str]] = {}
"""Ways to run it past whoever listens, with what is said."""


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.lin(x))


class Outer(nn.Module):
    """Opaque: it branches on a value, or does what no graph holds."""

    def __init__(self, inner: nn.Module, way: Way, branches: bool = True) -> None:
        super().__init__()
        self.inner, self.out = inner, nn.Linear(3, 3)
        self.way, self.branches = way, branches
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.way(self, x)
        if self.branches and x.sum() > 1e9:
            y = y * 2
        return self.out(y)


def heard(way: Way) -> Way:
    HEARD[way.__name__.strip("_")] = way
    return way


def refused(what: str) -> Callable[[Way], Way]:
    def enter(way: Way) -> Way:
        REFUSED[way.__name__.strip("_")] = way, what
        return way

    return enter


class Doubling(TorchDispatchMode):
    """Absolute values are doubled by it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is torch.ops.aten.abs.default else result


class DoublingFunctions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return result * 2 if getattr(function, "__name__", "") in ("abs", "clone") else result


@heard
def call(self: Any, x: Tensor) -> Tensor:
    return self.inner(x)


@heard
def dunder(self: Any, x: Tensor) -> Tensor:
    return type(self.inner).__call__(self.inner, x)


@heard
def functional(self: Any, x: Tensor) -> Tensor:
    return functional_call(self.inner, dict(self.inner.named_parameters()), (x,))


@heard
def in_a_new_container(self: Any, x: Tensor) -> Tensor:
    return nn.Sequential(nn.Sequential(self.inner))(x)


@heard
def data_parallel(self: Any, x: Tensor) -> Tensor:
    return nn.DataParallel(self.inner)(x)


@heard
def checkpointed(self: Any, x: Tensor) -> Tensor:
    return checkpoint(self.inner, x, use_reentrant=False)


@heard
def dispatched(self: Any, x: Tensor) -> Tensor:
    with Doubling():
        return self.inner(x)


@heard
def functions_seen(self: Any, x: Tensor) -> Tensor:
    with DoublingFunctions():
        return self.inner(x)


@heard
def compiled_before(self: Any, x: Tensor) -> Tensor:
    if self.kept is None:
        self.kept = torch.compile(lambda x: self.inner(x), backend="eager")
    return self.kept(x)


def cond(self: Any, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > -1e9, lambda x: self.inner(x), lambda x: x * 1.0, (x,))


@heard
def caught(self: Any, x: Tensor) -> Tensor:
    try:
        return self.inner(x[:, :2])
    except RuntimeError:
        return self.inner(x)


@heard
def kept_copy(self: Any, x: Tensor) -> Tensor:
    """A copy that an earlier forward made is another module."""
    if self.kept is None:
        self.kept = [copy.deepcopy(self.inner)]
        return self.inner(x)
    return self.inner(x) + self.kept[0](x).detach()


@refused("the module's forward runs without a call of it")
def forward(self: Any, x: Tensor) -> Tensor:
    return self.inner.forward(x)


@refused("the module's forward runs without a call of it")
def class_forward(self: Any, x: Tensor) -> Tensor:
    return type(self.inner).forward(self.inner, x)


@refused("the module's forward runs without a call of it")
def call_impl(self: Any, x: Tensor) -> Tensor:
    return self.inner._call_impl(x)


@refused("the module's forward runs without a call of it")
def call_and_forward(self: Any, x: Tensor) -> Tensor:
    return self.inner(x) + self.inner.forward(x)


@refused("the module's forward runs without a call of it")
def checkpointed_forward(self: Any, x: Tensor) -> Tensor:
    return checkpoint(self.inner.forward, x, use_reentrant=False)


@refused("the module runs inside a reentrant checkpoint")
def checkpointed_reentrant(self: Any, x: Tensor) -> Tensor:
    return checkpoint(self.inner, x, use_reentrant=True)


class Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Any) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            torch.autograd.backward(ctx.run(x), gradient)
        return x.grad, None


@refused("the module runs inside the forward of Reversible")
def in_a_function(self: Any, x: Tensor) -> Tensor:
    return Reversible.apply(x, self.inner)


@refused("a copy of the module runs")
def copied(self: Any, x: Tensor) -> Tensor:
    return copy.copy(self.inner)(x)


@refused("a copy of the module runs")
def copys_forward(self: Any, x: Tensor) -> Tensor:
    return copy.deepcopy(self.inner).forward(x)


@refused("a copy of the module runs")
def unpickled(self: Any, x: Tensor) -> Tensor:
    return pickle.loads(pickle.dumps(self.inner))(x)


@refused("the module runs inside a transform of torch.func")
def mapped(self: Any, x: Tensor) -> Tensor:
    return vmap(self.inner)(x)


@refused("the module runs inside a transform of torch.func")
def differentiated(self: Any, x: Tensor) -> Tensor:
    return grad(lambda x: self.inner(x).sum())(x)


@refused("the module runs in another thread")
def thread(self: Any, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    running = threading.Thread(target=lambda: found.append(self.inner(x)))
    running.start()
    running.join()
    return found[0]


@refused("the module runs in another thread")
def pool(self: Any, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as workers:
        return workers.submit(self.inner, x).result()


def build(way: Way, inner: type[nn.Module] = Inner, branches: bool = True) -> tuple[Outer, Tensor]:
    torch.manual_seed(0)
    return Outer(inner() if inner is not nn.Linear else nn.Linear(3, 3), way, branches), torch.randn(4, 3)


def l1(a: Tensor) -> Tensor:
    return S * a.abs().sum()


def rule(on: Any = "output") -> fxreg.Rule:
    return fxreg.Rule(fxreg.l1(S), name="inner", on=on)


def trained(gm: nn.Module, x: Tensor) -> tuple[Any, Tensor]:
    output, penalty = gm(x)
    (output.square().mean() + penalty).backward()
    return {name: p.grad for name, p in gm.named_parameters()}, penalty


def by_hand(model: Any, x: Tensor) -> Any:
    """Of the model before the forward ran, with what the caller of its inner module gets."""
    twin = copy.deepcopy(model)
    loss = twin(x).square().mean() + l1(twin.inner(x))
    loss.backward()
    return {name: p.grad for name, p in twin.named_parameters()}


@pytest.mark.parametrize("examples", [False, True], ids=["", "verified"])
@pytest.mark.parametrize("inner", [Inner, nn.Linear])
@pytest.mark.parametrize("name", HEARD)
def test_what_is_called_is_penalized(name: str, inner: type[nn.Module], examples: bool) -> None:
    model, x = build(HEARD[name], inner)
    expected = by_hand(model, x)
    value = l1(model.inner(x))
    if name == "compiled_before":
        model(x)
    gm = fxreg.transform(model, rule(), example_inputs=(x,) if examples else None, emit="output")
    model.kept = None if name == "kept_copy" else model.kept
    found, penalty = trained(gm, x)
    assert_same(found, expected, 1e-5)
    torch.testing.assert_close(penalty, value)
    torch.testing.assert_close(gm(x)[1], value)


@pytest.mark.parametrize("examples", [False, True], ids=["", "verified"])
@pytest.mark.parametrize("branches", [True, False], ids=["opaque", ""])
@pytest.mark.parametrize("inner", [Inner, nn.Linear])
@pytest.mark.parametrize("name", REFUSED)
def test_what_runs_past_the_listener_is_an_error(
    name: str, inner: type[nn.Module], branches: bool, examples: bool
) -> None:
    way, what = REFUSED[name]
    model, x = build(way, inner, branches)
    with pytest.raises(fxreg.CaptureError, match=rf"rule 'l1', output of inner: {what}.*(exclude=|Checkpoint)"):
        fxreg.transform(model, rule(), example_inputs=(x,) if examples else None)(x)
    assert torch.equal(fxreg.transform(model, fxreg.Rule(fxreg.l1(S), name="out", on="output"))(x), model(x))


@pytest.mark.slow
def test_what_is_compiled_as_one_graph_is_an_error_unless_it_is_about_others() -> None:
    model, x = build(cond, nn.Linear)
    with pytest.raises(fxreg.CaptureError, match=r"output of inner: something around is compiled as one graph"):
        fxreg.transform(model, rule())(x)
    assert torch.equal(fxreg.transform(model, fxreg.Rule(fxreg.l1(S), name="out", on="output"))(x), model(x))


def hooked(self: Any, x: Tensor) -> Tensor:
    """Hooks that come later than anybody's."""
    before = self.inner.register_forward_pre_hook(lambda module, args: (args[0] * 2,), prepend=True)
    behind = self.inner.register_forward_hook(lambda module, args, output: output * 3)
    y = self.inner(x)
    before.remove()
    behind.remove()
    return y


def test_what_hooks_of_the_forwards_own_do_is_heard_as_its_caller_sees_it() -> None:
    model, x = build(hooked)
    gm = fxreg.transform(model, rule(), emit="output")
    torch.testing.assert_close(gm(x)[1], l1(3 * model.inner(2 * x)))
    gm = fxreg.transform(model, rule("input"), emit="output")
    torch.testing.assert_close(gm(x)[1], l1(x))


def test_a_backward_hook_sees_the_penaltys_gradient_as_if_it_stood_behind_the_call() -> None:
    model, x = build(call)
    x.requires_grad_()
    model.inner.register_full_backward_pre_hook(lambda module, gradients: (gradients[0] * 0.5,))
    twin, seen = copy.deepcopy(model), list[Tensor]()
    twin.way = lambda self, x: seen.append(self.inner(x)) or seen[-1]
    (twin(x).square().mean() + l1(seen[0])).backward()
    expected = {name: p.grad for name, p in twin.named_parameters()}
    found, _ = trained(fxreg.transform(model, rule(), emit="output"), x)
    assert_same(found, expected, 1e-5)


class Twice(Inner):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + super().__call__(x)


def test_a_call_of_its_own_is_what_its_caller_sees() -> None:
    for branches in (True, False):
        model, x = build(call, Twice, branches)
        for examples in (None, (x,)):
            gm = fxreg.transform(model, rule(), example_inputs=examples, emit="output")
            torch.testing.assert_close(gm(x)[1], l1(model.inner(x)))


class Recursive(Inner):
    """Its forward is its own affair; its calls are not."""

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        if depth == 1:
            return self(x, 0)
        return self.forward(x.tanh(), depth - 1) if depth else super().forward(x)


def test_recursion_counts_as_many_times_as_there_are_calls() -> None:
    model, x = build(call, Recursive)
    gm = fxreg.transform(model, rule(), emit="output", example_inputs=(x,))
    torch.testing.assert_close(gm(x)[1], l1(model.inner(x)) + l1(model.inner(x.tanh(), 0)))


class Sometimes(Outer):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x) if x.sum() > 0 else x)


def test_a_module_that_a_forward_does_not_call_has_no_penalty() -> None:
    model = Sometimes(Inner(), call)
    gm = fxreg.transform(model, rule(), emit="output", example_inputs=(torch.ones(2, 3),))
    assert gm(-torch.ones(2, 3))[1] == 0
    torch.testing.assert_close(gm(torch.ones(2, 3))[1], l1(model.inner(torch.ones(2, 3))))


def test_nothing_is_left_behind() -> None:
    for way in (call, forward, kept_copy):
        model, x = build(way, nn.Linear)
        gm = fxreg.transform(model, rule())
        before, known = nn.Linear.forward, dict(vars(nn.Linear))
        with pytest.raises(fxreg.CaptureError) if way is forward else torch.enable_grad():
            gm(x)
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
            gm(x[:, :2])
        assert nn.Linear.forward is before
        assert dict(vars(nn.Linear)) == known
        assert vars(model.inner).keys() == vars(nn.Linear(3, 3)).keys()
    assert torch.equal(model.kept[0](x), model.inner(x))  # the copy that the last one kept computes for itself
    model.kept[0].weight.data.zero_()
    assert not torch.equal(model.kept[0](x), model.inner(x))


def test_other_threads_run_the_model_as_they_like() -> None:
    """One trains while another evaluates the model itself."""
    begun, done = threading.Event(), threading.Event()

    def slow(self: Any, x: Tensor) -> Tensor:
        if threading.current_thread() is threading.main_thread():
            begun.set()
            assert done.wait(60)
        return self.inner(x)

    model, x = build(slow)
    begun.set()
    done.set()
    gm, found = fxreg.transform(model, rule(), emit="output"), list[Any]()
    begun.clear()
    done.clear()

    def other() -> None:
        assert begun.wait(60)
        try:
            with torch.no_grad():
                found.append(model(x))
            found.append(gm(x)[1])
        finally:
            done.set()

    running = threading.Thread(target=other)
    running.start()
    output, penalty = gm(x)
    running.join()
    assert torch.equal(found[0], output)
    assert torch.equal(found[1], penalty)
    torch.testing.assert_close(penalty, l1(model.inner(x)))


def test_listening_does_not_take_the_fast_path_away() -> None:
    """Torch's encoder has one that it does not take where there are hooks."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    gm = fxreg.transform(encoder, fxreg.Rule(fxreg.l1(S), name="linear1", on="output"), emit="output").eval()
    with torch.no_grad():
        assert torch.equal(gm(x)[0], encoder(x))
        assert gm(x)[1] == 0  # in it, linear1 is not called


def test_global_hooks_are_what_a_caller_sees_too() -> None:
    model, x = build(call)
    gm = fxreg.transform(model, rule(), emit="output")
    handle = register_module_forward_hook(lambda module, args, output: output * 2 if module is model.inner else None)
    try:
        torch.testing.assert_close(gm(x)[1], l1(model.inner(x)))
    finally:
        handle.remove()
