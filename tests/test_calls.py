"""A layer that is called with stand-ins for its parameters computes with them, and keeps its own."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxreg
from fxreg import calls

LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(3, 2), torch.randn(4, 3)),
    "convolution": (lambda: nn.Conv2d(3, 2, 3, bias=False), torch.randn(4, 3, 5, 5)),
    "norm": (lambda: nn.BatchNorm1d(3), torch.randn(4, 3)),
    "embedding": (lambda: nn.Embedding(5, 3), torch.tensor([0, 2, 2])),
    "recurrent": (lambda: nn.GRU(3, 2), torch.randn(4, 2, 3)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), torch.randn(3, 2, 4)),
}


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", LAYERS)
def test_stand_ins_are_what_the_layer_computes_with(name: str) -> None:
    make, batch = LAYERS[name]
    layer = make()
    own = dict(layer.named_parameters())
    stand_ins = {name: torch.randn_like(parameter) for name, parameter in own.items()}
    expected = first(torch.func.functional_call(make(), stand_ins, (batch,)))
    torch.testing.assert_close(first(calls.call_with(layer, stand_ins, (batch,), {})), expected, rtol=0, atol=0)
    assert {name: id(parameter) for name, parameter in layer.named_parameters()} == {n: id(p) for n, p in own.items()}
    assert list(layer.state_dict()) == list(make().state_dict())
    if isinstance(layer, nn.GRU):
        assert layer._flat_weights[0] is layer.weight_ih_l0


def test_a_parameter_under_two_names_is_one() -> None:
    layer = nn.Bilinear(3, 3, 1, bias=False)
    layer.register_parameter("again", layer.weight)
    seen = []
    layer.register_forward_pre_hook(lambda own, args: seen.append((own.weight, own.again)))
    other = torch.randn_like(layer.weight)
    for hooked in (True, False):
        if not hooked:
            layer._forward_pre_hooks.clear()
            layer.bilinear = nn.functional.bilinear
        calls.call_with(layer, {"again": other}, (torch.randn(4, 3), torch.randn(4, 3)), {})
        assert layer.weight is layer.again is not other
    assert seen == [(other, other)]
    expected = nn.functional.bilinear(torch.ones(1, 3), torch.ones(1, 3), other)
    assert calls.call_with(layer, {"again": other}, (torch.ones(1, 3), torch.ones(1, 3)), {}) == expected


def test_a_layer_that_fails_keeps_its_parameters() -> None:
    layer = nn.Linear(3, 2)
    own = layer.weight
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        calls.call_with(layer, {"weight": torch.randn(2, 3)}, (torch.randn(4, 5),), {})
    assert layer.weight is own


def regularized(layer: nn.Module) -> nn.Module:
    return fxreg.transform(nn.Sequential(layer), [fxreg.Rule(fxreg.l1(0.1), via="gradient")])


def test_what_only_others_code_can_do_is_still_refused() -> None:
    """Hooks, and a forward of the instance's own, may hold a checkpoint that would bypass the rule."""
    batch = torch.randn(4, 3, requires_grad=True)
    forward = nn.Linear.forward

    def checkpointed(own: nn.Linear, args: Any, output: Tensor) -> Any:
        return checkpoint(lambda batch: forward(own, batch), args[0], use_reentrant=True)

    hooked = nn.Linear(3, 2)
    hooked.register_forward_hook(checkpointed)
    patched = nn.Linear(3, 2)
    patched.forward = lambda batch: checkpointed(patched, (batch,), batch)  # type: ignore[method-assign]
    for layer in (hooked, patched):
        with pytest.raises(fxreg.CaptureError, match="reentrant checkpoint"):
            regularized(layer)(batch)
    parent = nn.Sequential(hooked)
    parent.register_parameter("extra", nn.Parameter(torch.ones(())))
    with pytest.raises(fxreg.CaptureError, match="reentrant checkpoint"):
        calls.call_with(parent, {"extra": torch.ones(())}, (batch,), {})


def test_an_embedding_that_writes_its_weight_is_refused() -> None:
    gm = regularized(nn.Embedding(5, 3, max_norm=0.1))
    with pytest.raises(fxreg.CaptureError, match="changes a parameter in place"):
        gm(torch.tensor([0, 1]))


@pytest.mark.parametrize("backend", [None, "eager"])
def test_layers_of_torch_need_no_functional_call(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is most of what a site costs, to run and to compile."""
    monkeypatch.setattr(calls, "_call_any", None)
    layer = nn.Conv2d(3, 2, 3)
    gm = regularized(layer)
    if backend:
        gm = torch.compile(gm, backend=backend, fullgraph=True)  # type: ignore[assignment]
    gm(torch.ones(1, 3, 3, 3)).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, 1 + 0.1 * layer.weight.detach().sign())


class Counting(nn.Module):
    """Its buffer is another tensor after each call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return x * self.weight


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_a_buffer_that_the_forward_rebinds_is_rebound_in_compiled_code_too(backend: str | None, inside: bool) -> None:
    """`torch.func.functional_call` loses it there."""
    own = Counting()
    gm = fxreg.transform(nn.Sequential(own) if inside else own, fxreg.Rule(fxreg.clip_norm(0.1)))
    call = torch.compile(gm, backend=backend) if backend else gm
    for _ in range(3):
        call(torch.ones(3)).sum().backward()
    assert float(own.count) == 3  # type: ignore[arg-type]


def test_two_threads_in_one_layer_are_refused_and_leave_its_parameters() -> None:
    """One would compute with the other's stand-ins, and its gradient go the other's way."""
    layer, inside, done = nn.Linear(3, 2), threading.Event(), threading.Event()
    own = dict(layer._parameters)
    gm = fxreg.transform(layer, fxreg.Rule(fxreg.clip_norm(0.1)))

    def wait(*_: Any) -> None:
        inside.set()
        done.wait(10)

    handle = layer.register_forward_pre_hook(wait)
    thread = threading.Thread(target=gm, args=(torch.ones(1, 3),))
    thread.start()
    try:
        assert inside.wait(10)
        handle.remove()
        with pytest.raises(fxreg.CaptureError, match=r"two threads call one Linear at once, .*copy\.deepcopy"):
            gm(torch.ones(1, 3))
    finally:
        done.set()
        thread.join()
    assert all(layer._parameters[name] is parameter for name, parameter in own.items())
    gm(torch.ones(1, 3)).sum().backward()
    assert layer.weight.grad is not None


def test_a_thread_may_checkpoint_while_another_must_not() -> None:
    inside, done = threading.Event(), threading.Event()

    class Waiting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            done.wait(10)
            return x * self.weight

    gm = fxreg.transform(Waiting(), fxreg.Rule(fxreg.clip_norm(0.1)), emit="output")
    inside.clear()
    x = torch.ones(3, requires_grad=True)
    before = torch.utils.checkpoint.CheckpointFunction.apply
    thread = threading.Thread(target=gm, args=(x,))
    thread.start()
    try:
        assert inside.wait(10)
        checkpoint(torch.tanh, x, use_reentrant=True).sum().backward()
    finally:
        done.set()
        thread.join()
    assert torch.utils.checkpoint.CheckpointFunction.apply == before


class Asking(nn.Module):
    """Asks a parameter whether it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.adapter = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y + self.adapter(y) if any(one.requires_grad for one in self.adapter.parameters()) else y


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_without_gradients_a_layer_has_its_own_parameters(around: Any, backend: str | None) -> None:
    model, x = Asking(), torch.ones(2, 3)
    gm: Any = fxreg.transform(model, fxreg.Rule(fxreg.scale(0.5)))
    called = torch.compile(gm, backend=backend) if backend else gm
    for trained in (True, False):
        model.adapter.requires_grad_(trained)
        with around():
            torch.testing.assert_close(called(x), model(x), rtol=0, atol=0)


class Marked(nn.Parameter):
    """A parameter of a class of the user's, with a method."""

    def twice(self) -> Tensor:
        return self * 2


class Odd(nn.Module):
    """Runs as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.gain = Marked(torch.ones(3))
        self.linear.weight.seen = 0  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Any:
        y = self.run(x)
        return y if torch.as_tensor(x).sum() > -1e9 else x

    def run(self, x: Tensor) -> Any:
        raise NotImplementedError


class ByClass(Odd):
    def run(self, x: Tensor) -> Tensor:
        return self.linear(x) * (self.gain.twice() if isinstance(self.gain, Marked) else 3.0)


class ByCount(Odd):
    def run(self, x: Tensor) -> Tensor:
        self.linear.weight.seen += 1  # type: ignore[attr-defined]
        return self.linear(x) / self.linear.weight.seen  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [ByClass, ByCount])
def test_stand_ins_are_of_the_class_of_the_parameters_and_share_their_attributes(make: Any) -> None:
    model, x = make(), torch.randn(2, 3)
    twin = make()
    twin.load_state_dict(model.state_dict())
    gm: Any = fxreg.transform(model, fxreg.Rule(fxreg.scale(0.5)))
    assert fxreg.explain(gm).opaque
    for _ in range(3):
        found, expected = gm(x), twin(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert model.linear.weight.seen == twin.linear.weight.seen
        found.sum().backward()
        expected.sum().backward()
    torch.testing.assert_close(model.gain.grad, twin.gain.grad * 0.5 if twin.gain.grad is not None else None)
    torch.testing.assert_close(model.linear.weight.grad, twin.linear.weight.grad * 0.5)


class InGraph(Odd):
    """Dynamo takes all of it."""

    def forward(self, x: Tensor) -> Any:
        return self.linear(x) * (self.gain * 2 if isinstance(self.gain, Marked) else self.gain)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks
def test_dynamo_runs_what_has_parameters_of_a_class_as_it_is() -> None:
    torch.compiler.reset()
    model, x = InGraph(), torch.randn(2, 3)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.scale(0.5)))
    assert fxreg.explain(gm).opaque
    torch.testing.assert_close(torch.compile(gm, backend="aot_eager")(x), model(x), rtol=0, atol=0)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(gm, backend="aot_eager", fullgraph=True)(x)
    with pytest.raises(fxreg.CaptureError, match=r"inside torch\.func"):
        torch.func.grad(lambda x: gm(x).sum())(x)


class Later:
    """What a forward returns to be asked later."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x

    def value(self) -> Any:
        return self.model.linear(self.x)  # type: ignore[operator]


class ReturnsLater(Odd):
    def forward(self, x: Tensor) -> Any:
        return self.linear(x), Later(self, x)


class ReturnsFunction(Odd):
    def forward(self, x: Tensor) -> Any:
        return self.linear(x), lambda: self.linear(x)


@pytest.mark.parametrize("make", [ReturnsLater, ReturnsFunction])
def test_what_leads_to_a_module_is_not_returned_where_gradients_are_transformed(make: Any) -> None:
    gm: Any = fxreg.transform(make(), fxreg.Rule(fxreg.scale(0.5)))
    with pytest.raises(fxreg.CaptureError, match="leads to a module that may"):
        gm(torch.ones(2, 3))
    assert gm.eval() is gm
    with torch.no_grad():
        gm(torch.ones(2, 3))


class ByIdentity(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.bits = {id(self.linear.weight): 2}

    def run(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.bits.get(id(self.linear.weight), 8)


class ByKey(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.bits = {self.linear.weight: 2}

    def run(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.bits.get(self.linear.weight, 8)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("make", [ByIdentity, ByKey])
def test_where_it_is_asked_which_parameter_one_is_nothing_stands_in(make: Any) -> None:
    with pytest.raises(fxreg.CaptureError):
        fxreg.transform(make(), fxreg.Rule(fxreg.scale(0.5)))
