"""Rules on activations: every call counts, wherever it stands, and training is training the hand-written loss."""

import collections
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import fxreg

from .marks import slow_but
from .reference import Gradients, assert_same

pytestmark = pytest.mark.filterwarnings(  # Dynamo, where its graph breaks
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)
S = 0.37


class Block(nn.Module):
    """Traced through: a layer, a function, a method, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.out = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc(x))
        h = F.relu(self.act(h) + 0.1)
        return self.out(h).relu() - x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(3, 4), Block(), nn.Linear(4, 2)
        self.norm = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.norm(self.body(self.stem(x)))))


class InPlace(nn.Module):
    """What is penalized is written to later: by a layer, a method, an assignment, through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a(x))
        h = self.b(h)
        h.view(-1).mul_(2.0)
        h = self.c(h)
        h[0] = 0.0
        return h.add_(1.0)


def doubling(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    args[0].mul_(2.0)


class InPlaceToo(nn.Module):
    """The same by an operator, by a function that is given everything by name, and by a layer's hook."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = nn.Tanh()
        self.act.register_forward_pre_hook(doubling)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h += 1.0
        h = self.b(h)
        torch.relu_(input=h)
        return self.act(self.c(h))


class Both(nn.Module):
    """A layer that is given a tensor twice, and gives it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.both = nn.Linear(3, 4), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        one, other = self.both((h, h.contiguous()))
        return one + other


class BothOpaque(Both):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > -1e9 else x


class Queue(nn.Module):
    """Gives tensors where only a walk through everything finds them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Any:
        return self.a(x), collections.deque([self.b(x), 7])


class Queued(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue()

    def forward(self, x: Tensor) -> Tensor:
        first, rest = self.queue(x)
        return first + rest[0]


class Gate(nn.Module):
    """Opaque: it branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc(x)) if x.sum() > -1e9 else x
        return self.fc(self.act(h)).mul_(0.5)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Linear(3, 4), Gate(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(self.stem(x)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class RecurrentOnly(Recurrent):
    """The caller may write into what is penalized."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.attention(h, h, h)[0]


class Pair(nn.Module):
    """A module of the user's that returns more than a tensor, and is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Any]:
        return {"left": self.left(x) * scale, "rest": [self.right(x), 7]}


class Paired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.gain = Pair(), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        found = self.pair(x, scale=self.gain * 2)
        return found["left"] + found["rest"][0]


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.net(x).square().mean()}


def l1(a: Tensor) -> Tensor:
    return S * a.abs().sum()


def l2(a: Tensor) -> Tensor:
    return S * a.square().sum()


def seen(model: nn.Module, x: Tensor, chosen: Callable[[str], bool], on: str) -> tuple[Any, list[Tensor]]:
    """The output of a model, and what its chosen modules were called with or gave, in copies."""
    found: list[Tensor] = []

    def keep(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value.clone())
        several = isinstance(value, tuple | list | collections.deque)
        for part in value.values() if isinstance(value, dict) else value if several else ():
            keep(part)

    handles = []
    for name, module in model.named_modules():
        if chosen(name) and on == "output":
            handles.append(module.register_forward_hook(lambda m, a, out: keep(out)))
        elif chosen(name):
            handles.append(module.register_forward_pre_hook(lambda m, a, k: keep((a, k)), with_kwargs=True))
    output = model(x)
    for handle in handles:
        handle.remove()
    return output, found


def expected(
    model: nn.Module, x: Tensor, chosen: Callable[[str], bool], on: str = "output", term: Any = l1
) -> Gradients:
    """Gradients of the hand-written loss."""
    twin = copy.deepcopy(model)
    output, found = seen(twin, x, chosen, on)
    loss = output["loss"] if isinstance(output, dict) else output.square().mean()
    loss = loss + sum((term(one) for one in found), torch.zeros(()))
    parameters = dict(twin.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, [*parameters.values()], allow_unused=True), strict=True))


def trained(gm: nn.Module, model: nn.Module, x: Tensor, emit: str = "backward") -> Gradients:
    model.zero_grad()
    output = gm(x)
    if emit == "output":
        (output[0].square().mean() + output[1]).backward()
    else:
        (output["loss"] if isinstance(output, dict) else output.square().mean()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


CASES: dict[str, tuple[type[nn.Module], dict[str, Any], str, Any]] = {
    "layer": (Net, {"layer": nn.Linear}, "output", ("stem", "head", "body.fc", "body.out")),
    "twice": (Net, {"layer": "Tanh"}, "output", ("body.act",)),
    "input": (Net, {"name": "body.*"}, "input", ("body.fc", "body.act", "body.out")),
    "container": (Net, {"layer": Block}, "output", ("body",)),
    "its input": (Net, {"layer": Block}, "input", ("body",)),
    "root": (Net, {"name": ""}, "output", ("",)),
    "root's input": (Net, {"name": ""}, "input", ("",)),
    "in place": (InPlace, {"layer": nn.Linear}, "output", ("a", "b", "c")),
    "in place, input": (InPlace, {"name": "act"}, "input", ("act",)),
    "in place, root": (InPlace, {"name": ""}, "output", ("",)),
    "in place too": (InPlaceToo, {"layer": nn.Linear}, "output", ("a", "b", "c")),
    "twice the same": (Both, {"name": "both"}, "output", ("both",)),
    "twice the same, opaque": (BothOpaque, {"name": "both"}, "output", ("both",)),
    "a queue": (Queued, {"layer": Queue}, "output", ("queue",)),
    "opaque": (Gated, {"name": "gate"}, "output", ("gate",)),
    "inside opaque": (Gated, {"name": "gate.*"}, "output", ("gate.fc", "gate.act")),
    "inside opaque, input": (Gated, {"layer": nn.Tanh}, "input", ("gate.act",)),
    "opaque root": (Gate, {"layer": nn.Tanh}, "output", ("act",)),
    "opaque root itself": (Gate, {"layer": Gate}, "output", ("",)),
    "several tensors": (Recurrent, {"layer": nn.LSTM}, "output", ("lstm",)),
    "several tensors, root": (RecurrentOnly, {"layer": nn.LSTM}, "output", ("lstm",)),
    "attention": (Attending, {"layer": nn.MultiheadAttention}, "output", ("attention",)),
    "a structure": (Paired, {"layer": Pair}, "output", ("pair",)),
    "keywords": (Paired, {"layer": Pair}, "input", ("pair",)),
}


def build(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    shape = {Gate: (5, 4), Recurrent: (5, 6, 3), RecurrentOnly: (5, 6, 3), Attending: (5, 6, 3)}.get(kind, (5, 3))
    return kind(), torch.randn(shape)


@pytest.mark.parametrize("emit", slow_but(["backward"], ["backward", "output"]))
@pytest.mark.parametrize("examples", [False, True], ids=["", "verified"])
@pytest.mark.parametrize("case", CASES)
def test_training_is_training_the_hand_written_loss(case: str, examples: bool, emit: Any) -> None:
    kind, keys, on, names = CASES[case]
    model, x = build(kind)
    rule = fxreg.Rule(fxreg.l1(S), on=on, **keys)
    gm = fxreg.transform(model, rule, example_inputs=(x,) if examples else None, emit=emit)
    wanted = expected(model, x, names.__contains__, on)
    assert_same(trained(gm, model, x, emit), wanted, 1e-5)
    output, found = seen(copy.deepcopy(model), x, names.__contains__, on)
    value = sum(l1(one) for one in found)
    torch.testing.assert_close(fxreg.penalties(gm, x)["l1"], value.detach())
    if emit == "output":
        torch.testing.assert_close(gm(x)[1], value)
    else:
        assert torch.equal(gm(x), output)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case",
    slow_but(["layer"], ["layer", "twice", "input", "container", "root", "in place", "attention", "a structure"]),
)
def test_compiled_it_is_the_same_in_one_graph(case: str, backend: str) -> None:
    kind, keys, on, names = CASES[case]
    model, x = build(kind)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l2(S), on=on, reduction="batch", **keys))
    wanted = expected(model, x, names.__contains__, on, lambda a: l2(a) / len(a))
    assert_same(trained(torch.compile(gm, backend=backend, fullgraph=True), model, x), wanted, 1e-4)


@pytest.mark.parametrize("case", slow_but(["inside opaque"], ["opaque", "inside opaque", "opaque root"]))
def test_compiled_what_is_inside_opaque_modules_is_penalized(case: str) -> None:
    kind, keys, on, names = CASES[case]
    model, x = build(kind)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(S), on=on, **keys))
    assert_same(trained(torch.compile(gm, backend="aot_eager"), model, x), expected(model, x, names.__contains__), 1e-5)


class Ops(nn.Module):
    """The same function under several names, in modules and beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(3, 4), nn.Linear(4, 4), nn.ReLU()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.noted(x, lambda name, value: None)

    def noted(self, x: Tensor, note: Callable[[str, Tensor], None]) -> Tensor:
        h = self.a(x)
        note("relu in", h)
        h = torch.relu(h)
        note("relu", h)
        note("torch.relu", h)
        h = self.b(self.act(h))
        note("relu in", h)
        h = F.relu(h)
        note("relu", h)
        note("F.relu", h)
        note("add in", h)
        h = h + 1.0
        note("add", h)
        note("relu in", h)
        h = h.relu()
        note("relu", h)
        note("Tensor.relu", h)
        one, two = h.chunk(2, -1)
        note("chunk", one)
        note("chunk", two)
        h = torch.cat([two, one], -1).clone()
        h = h.relu_()
        note("relu_", h)
        return self.inside(h, note)

    def inside(self, x: Tensor, note: Callable[[str, Tensor], None]) -> Tensor:
        h = self.block.act(self.block.fc(x))
        h = self.block.act(h) + 0.1
        note("block relu in", h)
        h = F.relu(h)
        note("block relu", h)
        h = self.block.out(h)
        note("block relu in", h)
        h = h.relu()
        note("block relu", h)
        return h - x


class Calling(Ops):
    """As it is run."""

    def inside(self, x: Tensor, note: Callable[[str, Tensor], None]) -> Tensor:
        return self.block(x)


OPS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "name": ({"op": "relu", "on": "output"}, ("relu", "block relu")),
    "input": ({"op": "relu", "on": "input"}, ("relu in", "block relu in")),
    "in a module": ({"op": "relu", "on": "output", "name": "block"}, ("block relu",)),
    "in a class": ({"op": "relu", "on": "output", "layer": Block}, ("block relu",)),
    "not in it": ({"op": "relu", "on": "output", "exclude": "block"}, ("relu",)),
    "at the root": ({"op": "relu", "on": "output", "name": ""}, ("relu",)),
    "function": ({"op": torch.relu, "on": "output"}, ("torch.relu",)),
    "functional": ({"op": F.relu, "on": "output", "name": ""}, ("F.relu",)),
    "method": ({"op": Tensor.relu, "on": "output", "name": ""}, ("Tensor.relu",)),
    "dotted": ({"op": "functional.relu", "on": "output", "name": ""}, ("F.relu",)),
    "operator": ({"op": "add", "on": "output", "name": ""}, ("add",)),
    "its input": ({"op": "add", "on": "input", "name": ""}, ("add in",)),
    "several": ({"op": "chunk", "on": "output"}, ("chunk",)),
    "in place": ({"op": "relu_", "on": "output"}, ("relu_",)),
}


@pytest.mark.parametrize("examples", [False, True], ids=["", "verified"])
@pytest.mark.parametrize("case", OPS)
def test_calls_of_functions_are_penalized_by_name_or_identity(case: str, examples: bool) -> None:
    keys, names = OPS[case]
    torch.manual_seed(1)
    model, x = Calling(), torch.randn(5, 3)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l2(S), **keys), example_inputs=(x,) if examples else None)
    by_hand = Ops()
    by_hand.load_state_dict(model.state_dict())
    terms: list[Tensor] = []
    output = by_hand.noted(x, lambda name, value: terms.append(l2(value.clone())) if name in names else None)
    loss = output.square().mean() + sum(terms)
    wanted = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, [*by_hand.parameters()]), strict=True))
    assert_same(trained(gm, model, x), wanted, 1e-5)
    torch.testing.assert_close(fxreg.penalties(gm, x)["l2"], sum(terms).detach())


@pytest.mark.parametrize("op", ["torch.nn.functional.gelu", "functional.gelu", "torch._C._nn.gelu"])
def test_a_dotted_name_is_the_one_by_which_python_finds_the_function(op: str) -> None:
    class Gelu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(x.sigmoid())  # which calls itself torch._C._nn.gelu

    x = torch.randn(2, 3)
    gm = fxreg.transform(Gelu(), fxreg.Rule(fxreg.l1(0.5), op=op, on="output"))
    torch.testing.assert_close(fxreg.penalties(gm, x)["l1"], 0.5 * F.gelu(x.sigmoid()).abs().sum())
    for other in ("torch.gelu", "torch.sigmoid", "gelu.functional"):
        with pytest.raises(fxreg.MatchError, match=f"no call of {other}; nearest calls"):
            fxreg.transform(Gelu(), fxreg.Rule(fxreg.l1(0.5), op=other, on="output"))


@pytest.mark.parametrize("examples", [False, True], ids=["", "verified"])
@pytest.mark.parametrize("op", ["div", "truediv", "remainder", "mod"])
def test_operators_are_one_by_either_name(op: str, examples: bool) -> None:
    class Divided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.sigmoid(self.a(x)) + 1.0
            return 1.0 / h + h / 3.0 + torch.div(h, 5.0) + h % 2.0

    model, x = Divided(), torch.randn(5, 3)
    rule = fxreg.Rule(fxreg.l2(S), op=op, on="output")
    gm = fxreg.transform(model, rule, example_inputs=(x,) if examples else None, emit="output")
    h = torch.sigmoid(model.a(x)) + 1.0
    wanted = l2(1.0 / h) + l2(h / 3.0) + l2(h / 5.0) if "div" in op else l2(h % 2.0)
    torch.testing.assert_close(gm(x)[1], wanted)
    torch.testing.assert_close(fxreg.penalties(gm, x)["l2"], wanted.detach())


@pytest.mark.parametrize("examples", [False, True], ids=["", "verified"])
def test_what_is_penalized_may_be_the_memory_that_a_call_wrote_to(examples: bool) -> None:
    class Silu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            F.silu(h, inplace=True)
            return h.mul_(2.0)

    torch.manual_seed(1)
    model, x = Silu(), torch.randn(5, 3)
    gm = fxreg.transform(
        model, fxreg.Rule(fxreg.l2(S), op="silu", on="output"), example_inputs=(x,) if examples else None
    )
    h = F.silu(model.a(x))
    wanted = torch.autograd.grad((2 * h).square().mean() + l2(h), [*model.parameters()])
    assert_same(trained(gm, model, x), dict(zip(dict(model.named_parameters()), wanted, strict=True)), 1e-5)


@pytest.mark.parametrize(
    "how", [lambda gm: gm, lambda gm: torch.compile(gm, backend="aot_eager")], ids=["", "compiled"]
)
def test_the_caller_may_write_into_the_output(how: Callable[[Any], Any]) -> None:
    model, x = build(Net)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l2(S), name="head", on="output"), example_inputs=(x,))
    output = model(x)
    wanted = torch.autograd.grad((3 * output).square().mean() + l2(output), [*model.parameters()])
    how(gm)(x).mul_(3.0).square().mean().backward()
    names = dict(model.named_parameters())
    assert_same({name: p.grad for name, p in names.items()}, dict(zip(names, wanted, strict=True)), 1e-5)


class Normal(nn.Module):
    """A bias whose gradient is zero, but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)))


@pytest.mark.parametrize("seed", range(3))
def test_gradients_that_are_nothing_but_rounding_are_not_compared(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Normal(), torch.randn(5, 3)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l2(S), name="norm", on="output"), example_inputs=(x,))
    found, wanted = trained(gm, model, x), expected(model, x, {"norm"}.__contains__, term=l2)
    assert max(one.pop("a.bias").abs().max() for one in (found, wanted)) < 1e-4
    assert_same(found, wanted, 1e-4)


class Nothing(nn.Module):
    """Opaque, and gives nothing."""

    def forward(self, x: Tensor) -> Tensor | None:
        self.count = 1
        return None if x.sum() > -1e9 else x


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nothing, self.a = Nothing(), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        found = self.nothing(x)
        if found is None:
            return self.a(x)
        return found


@pytest.mark.parametrize("examples", [False, True], ids=["", "verified"])
def test_a_mark_is_no_use_of_what_a_module_gave(examples: bool) -> None:
    model, x = Asking(), torch.randn(5, 3)
    rules = [fxreg.Rule(fxreg.l2(S), name=name, on="input", label=name) for name in ("nothing", "a")]
    gm = fxreg.transform(model, rules, example_inputs=(x,) if examples else None)
    torch.testing.assert_close(fxreg.penalties(gm, x), {"nothing": l2(x), "a": l2(x)})
    assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize("emit", ["backward", "output"])
@pytest.mark.parametrize("op", [torch.gt, torch.fft.fft], ids=["bool", "complex"])
def test_what_is_no_floating_point_tensor_is_refused(op: Any, emit: Any) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return h * torch.gt(h, 0.0) + torch.fft.fft(h).abs()

    model, x = Odd(), torch.randn(5, 3)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l2(S), op=op, on="output"), emit=emit)
    with pytest.raises(
        fxreg.RuleError, match=r"l2 penalizes floating-point tensors, and met one of torch.(bool|complex64)"
    ):
        gm(x)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batch"])
def test_a_reduction_divides_by_the_batch_or_the_elements(reduction: Any) -> None:
    model, x = build(Net)
    rule = fxreg.Rule(fxreg.l1(S), name="body.fc", on="output", reduction=reduction)
    gm = fxreg.transform(model, rule, emit="output")
    a = model.body.fc(model.stem(x))
    by = {"sum": 1, "mean": a.numel(), "batch": len(a)}[reduction]
    torch.testing.assert_close(gm(x)[1], l1(a) / by)


def test_a_loss_of_the_models_own_gets_the_penalty_in_training() -> None:
    model = Loss()
    x = torch.randn(5, 3)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(S), layer="Tanh", on="output"), emit="loss", example_inputs=(x,))
    assert_same(trained(gm, model, x), expected(model, x, {"net.body.act"}.__contains__), 1e-5)
    gm.eval()
    assert torch.equal(gm(x)["loss"], model(x)["loss"])


def test_rules_on_activations_and_parameters_add_up_with_the_loss_scale() -> None:
    model, x = build(Net)
    rules = [
        fxreg.Rule(fxreg.l1(S), layer="Tanh", on="output"),
        fxreg.Rule(fxreg.l2(0.2), param="weight"),
        fxreg.Rule(fxreg.l2(S), name="head", on="input"),
    ]
    gm = fxreg.transform(model, rules, example_inputs=(x,))
    twin = copy.deepcopy(model)
    output, acts = seen(twin, x, {"body.act"}.__contains__, "output")
    _, heads = seen(twin, x, {"head"}.__contains__, "input")
    loss = output.square().mean() + sum(map(l1, acts)) + sum(map(l2, heads))
    loss = loss + 0.2 * sum(p.square().sum() for n, p in twin.named_parameters() if n.endswith("weight"))
    wanted = dict(zip(dict(twin.named_parameters()), torch.autograd.grad(8 * loss, [*twin.parameters()]), strict=True))
    fxreg.set_loss_scale(gm, 8)
    model.zero_grad()
    (8 * gm(x).square().mean()).backward()
    assert_same({name: p.grad for name, p in model.named_parameters()}, wanted, 1e-5)
    values = fxreg.penalties(gm, x)
    assert list(values) == ["l1", "l2", "l2_2"]
    torch.testing.assert_close(values["l1"], sum(map(l1, acts)).detach())


def test_a_strength_is_live_and_nothing_is_compiled_again() -> None:
    model, x = build(Net)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.1), layer="Tanh", on="output", label="quiet"))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gm, backend=counter)
    for strength in (0.1, S, 0.0):
        fxreg.strengths(gm)["quiet"] = strength
        wanted = expected(model, x, {"body.act"}.__contains__, term=lambda a, s=strength: s * a.abs().sum())
        assert_same(trained(compiled, model, x), wanted, 1e-5)
    assert counter.frame_count == 1


def test_under_no_grad_nothing_is_added_and_the_value_is_still_given() -> None:
    model, x = build(Gated)
    rule = fxreg.Rule(fxreg.l1(S), layer="Tanh", on="output")
    backward, output = fxreg.transform(model, rule), fxreg.transform(model, rule, emit="output")
    with torch.no_grad():
        assert torch.equal(backward(x), model(x))
        value = output(x)[1]
    torch.testing.assert_close(value, fxreg.penalties(output, x)["l1"])


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda gm: pickle.loads(pickle.dumps(gm)),
    "deepcopy": copy.deepcopy,
    "re-trace": torch.fx.symbolic_trace,
}


@pytest.mark.parametrize(
    ("case", "how"),
    [
        (case, how)
        for case in ("layer", "in place", "inside opaque", "several tensors", "opaque root")
        for how in COPIES
        if (case, how) != ("in place", "re-trace")  # fx itself has no item assignment
    ],
)
def test_copies_of_the_module_have_the_penalty(case: str, how: str) -> None:
    kind, keys, on, names = CASES[case]
    model, x = build(kind)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(S), on=on, reduction="batch", **keys))
    wanted = expected(model, x, names.__contains__, on, lambda a: l1(a) / len(a))
    made = COPIES[how](gm)
    made(x).square().mean().backward()
    own = model if how == "re-trace" else made
    assert_same({name: p.grad for name, p in own.named_parameters()}, wanted, 1e-5)


@pytest.mark.parametrize("case", ["layer", "inside opaque", "several tensors"])
def test_functional_calls_and_gradients_by_sample(case: str) -> None:
    kind, keys, on, names = CASES[case]
    model, x = build(kind)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(S), on=on, **keys))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(gm, given, (x,)).square().mean()

    assert_same(dict(grad(loss)(parameters, x)), expected(model, x, names.__contains__, on), 1e-5)
    if case != "layer":
        return  # neither a branch on a value nor an LSTM can be mapped
    found = vmap(grad(loss), (None, 0))(parameters, x[:, None])
    for i in range(len(x)):
        wanted = expected(model, x[i, None], names.__contains__, on)
        assert_same({name: one[i] for name, one in found.items()}, wanted, 1e-5)


@pytest.mark.parametrize("emit", ["output", "loss"])
def test_second_derivatives_see_the_penalty(emit: Any) -> None:
    model, x = Loss().double(), torch.randn(5, 3, dtype=torch.float64)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l2(S), layer="Tanh", on="output"), emit=emit)
    weight = model.net.body.fc.weight

    def curvature(loss: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    output, found = seen(model, x, {"net.body.act"}.__contains__, "output")
    result = gm(x)
    total = result["loss"] if emit == "loss" else result[0]["loss"] + result[1]
    torch.testing.assert_close(curvature(total), curvature(output["loss"] + sum(map(l2, found))))


def test_under_autocast_activations_in_bfloat16_are_penalized_in_float32() -> None:
    model, x = build(Net)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l2(S), name="body.fc", on="output"), emit="output")
    with torch.autocast("cpu", torch.bfloat16):
        _, penalty = gm(x)
        _, (a,) = seen(model, x, {"body.fc"}.__contains__, "output")
    assert a.dtype == torch.bfloat16
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, l2(a.float()))


class PartlyInBfloat16(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.act(self.a(x))
        return self.b(h.float())


@pytest.mark.parametrize("emit", ["backward", "output"])
@pytest.mark.parametrize("layer", ["ReLU", "Linear"])
def test_penalties_that_pass_through_an_autocast_region_are_verified_as_exactly_as_it_computes(
    layer: str, emit: Any
) -> None:
    torch.manual_seed(0)
    model, x = PartlyInBfloat16(), torch.randn(16, 8)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.1), layer=layer, on="output"), example_inputs=(x,), emit=emit)
    assert fxreg.explain(gm).verified
    adding = next(node for node in gm.graph.nodes if any(isinstance(arg, list) and arg for arg in node.args[-2:]))
    adding.args = tuple([*arg, *arg] if isinstance(arg, list) else arg for arg in adding.args)
    gm.recompile()
    with pytest.raises(fxreg.VerifyError, match=r"gradient of|the penalty"):
        fxreg.verify(gm, model, (x,))


def test_strip_takes_the_penalty_away() -> None:
    for case in ("layer", "in place", "inside opaque", "opaque root", "several tensors"):
        kind, keys, on, _ = CASES[case]
        model, _ = build(kind)
        gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(S), on=on, **keys))
        assert fxreg.strip(gm).code == fxreg.transform(model, []).code


def test_a_module_with_two_paths_is_one_site() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.two = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).tanh())

    model, x = Shared(), torch.randn(5, 3)
    rule = fxreg.Rule(fxreg.l1(S), name="two", on="output")
    (edit,) = fxreg.explain(model, rule).edits
    assert (edit.sites, edit.aliases) == (("one",), ("two",))
    gm = fxreg.transform(model, rule, example_inputs=(x,))
    assert_same(trained(gm, model, x), expected(model, x, {"one"}.__contains__), 1e-5)


def test_an_argument_that_is_a_parameter_is_no_activation() -> None:
    model, x = build(Net)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(S), op="linear", on="input", optional=True), example_inputs=(x,))
    assert fxreg.penalties(gm, x)["l1"] == 0

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.tanh(), self.weight)

    model = Functional()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(S), op=F.linear, on="input"), example_inputs=(x,))
    torch.testing.assert_close(fxreg.penalties(gm, x)["l1"], l1(x.tanh()))
    gm(x).sum().backward()
    torch.testing.assert_close(model.weight.grad, x.tanh().sum(0).expand(2, 3))


class Switching(nn.Module):
    """Does other things in training: a graph for each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return F.gelu(self.b(h)) if self.training else h


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("keys", [{"layer": "Linear"}, {"op": "gelu"}], ids=["layer", "op"])
def test_each_mode_has_the_penalties_of_its_own_calls(keys: dict[str, Any], training: bool) -> None:
    model, x = Switching(), torch.randn(4, 3)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(S), on="output", **keys), example_inputs=(x,))
    gm.train(training)
    if "op" in keys:
        wanted = l1(model(x)).detach() if training else torch.zeros(())
        torch.testing.assert_close(fxreg.penalties(gm, x)["l1"], wanted)
        return
    names = {"a", "b"} if training else {"a"}
    assert_same(trained(gm, model, x), expected(model, x, names.__contains__), 1e-5)


def test_a_graph_that_cannot_show_the_calls_refuses_what_another_was_recorded_for() -> None:
    model, x = Switching(), torch.randn(4, 3)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(S), op="gelu", on="output"), example_inputs=(x,))
    with pytest.raises(fxreg.CaptureError, match=r"looks for calls of gelu in the forward of 'the model'"):
        gm(torch.randn(2, 4, 3))  # another number of dimensions than the recorded one


@pytest.mark.parametrize(("keys", "error", "message"), [
    ({"op": "relu"}, fxreg.RuleError, "op='relu' selects activations. Say which with on='output' or on='input'"),
    ({"on": "outputs"}, fxreg.RuleError, "on must be 'param', 'output' or 'input', got 'outputs'"),
    ({"on": "output", "param": "weight"}, fxreg.RuleError, "param='weight' selects parameters, but on='output'"),
    ({"reduction": "mean"}, fxreg.RuleError, "reduction='mean' is for activations"),
    ({"on": "output", "reduction": "max"}, fxreg.RuleError, "reduction must be 'sum', 'mean' or 'batch', got 'max'"),
    ({"on": "output", "op": nn.ReLU}, fxreg.RuleError, "op=ReLU is a class; modules are selected with layer="),
    ({"on": "output", "op": "a b"}, fxreg.RuleError, "op must be a function or method, or its name"),
    ({"on": "output", "via": "gradient"}, fxreg.RuleError, "on='output' is for penalties in the graph"),
    ({"on": "output", "name": "boddy"}, fxreg.MatchError, "matched no module; nearest modules: 'body'"),
    ({"on": "output", "op": "gelu"}, fxreg.MatchError, "the forward makes no call of gelu; nearest calls: '"),
    ({"on": "output", "op": F.relu, "name": ""}, fxreg.MatchError, "the forward makes no call of relu"),
    ({"on": "output", "layer": "Linaer"}, fxreg.RuleError, "names a class that is neither in torch.nn"),
])  # fmt: skip
def test_what_does_not_fit_is_an_error_that_says_how_to_mend_it(
    keys: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message.replace("(", r"\(")):
        fxreg.transform(Net(), fxreg.Rule(fxreg.l1(0.1), **keys))


def test_a_module_that_is_never_called_is_an_error_unless_optional() -> None:
    model = Net()
    model.spare = nn.Linear(2, 2)
    with pytest.raises(fxreg.MatchError, match=r"'l1' \(output of spare\): the forward makes no call"):
        fxreg.transform(model, fxreg.Rule(fxreg.l1(0.1), name="spare", on="output"))
    fxreg.transform(model, fxreg.Rule(fxreg.l1(0.1), name="spare", on="output", optional=True))


def test_transforms_and_other_gradients_are_not_for_activations() -> None:
    with pytest.raises(fxreg.RuleError, match="on='output' is for penalties in the graph"):
        fxreg.Rule(fxreg.clip_norm(1.0), on="output")
    with pytest.raises(fxreg.RuleError, match="l2_sp has a tensor for each parameter"):
        fxreg.Rule(fxreg.l2_sp(1.0), on="output")


def test_duplicates_are_refused_and_input_and_output_are_two_places() -> None:
    rules = [
        fxreg.Rule(fxreg.l1(0.1), name="head", on="output"),
        fxreg.Rule(fxreg.l1(0.2), layer="Linear", on="output"),
    ]
    with pytest.raises(fxreg.MatchError, match="duplicates: both put l1 on 'head'"):
        fxreg.transform(Net(), rules)
    fxreg.transform(Net(), [rules[0], fxreg.Rule(fxreg.l1(0.1), name="head", on="input")])


@pytest.mark.parametrize("on", ["output", "input"])
def test_one_call_said_in_two_ways_is_a_duplicate(on: Any) -> None:
    class Relu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) + torch.relu(x)

    rules = [fxreg.Rule(fxreg.l1(0.1), op="relu", on=on), fxreg.Rule(fxreg.l1(0.2), op=F.relu, on=on)]
    with pytest.raises(fxreg.MatchError, match=r"'l1' and 'l1_2' are duplicates: .* of a call of .*functional\.relu"):
        fxreg.transform(Relu(), rules)
    fxreg.transform(Relu(), [fxreg.Rule(fxreg.l1(0.1), op=torch.relu, on=on), rules[1]])
    fxreg.transform(Relu(), [fxreg.Rule(fxreg.l2(0.1), op="relu", on=on), rules[1]])


def test_calls_that_an_opaque_module_may_make_are_refused() -> None:
    rule = fxreg.Rule(fxreg.l1(0.1), op="tanh", on="output")
    with pytest.raises(
        fxreg.CaptureError,
        match=r"forward of 'gate', which the graph does not show: gate .* \(asks __bool__ of a value\)",
    ):
        fxreg.transform(Gated(), rule)


def test_an_exported_program_has_no_activations_to_match() -> None:
    model, x = build(Net)
    program = torch.export.export(model, (x,))
    with pytest.raises(fxreg.CaptureError, match=r"rule 'l1' is on activations.*Transform the model"):
        fxreg.transform(program, fxreg.Rule(fxreg.l1(0.1), layer="Linear", on="output"))


def test_an_integer_input_is_an_error_when_it_runs() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    model, x = Words(), torch.tensor([[1, 2]])
    rule = fxreg.Rule(fxreg.l1(0.1), name="embed", on="input")
    with pytest.raises(fxreg.FxregError, match="input of embed: there is no floating-point tensor to penalize"):
        fxreg.transform(model, rule)(x)


def test_a_formula_that_does_not_fit_an_activation_says_so() -> None:
    model, x = build(Net)
    rule = fxreg.Rule(fxreg.group_lasso(0.1, dim=3), name="head", on="output")
    with pytest.raises(fxreg.RuleError, match=r"group_lasso\(0.1, dim=3, size=1\) does not fit the output of head"):
        fxreg.transform(model, rule, example_inputs=(x,))


def test_penalties_need_inputs_and_leave_everything_as_it_was() -> None:
    model, x = build(Net)
    model.norm = nn.Dropout(0.5)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(S), layer="Tanh", on="output"))
    with pytest.raises(fxreg.FxregError, match="rule 'l1' is on activations, which depend on inputs"):
        fxreg.penalties(gm)
    before = torch.get_rng_state()
    fxreg.penalties(gm, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("opaque", [False, True])
def test_penalties_of_a_model_that_takes_nothing_need_no_inputs(opaque: bool) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.lin = nn.Parameter(torch.ones(1, 3)), nn.Linear(3, 3)

        def forward(self, x: Tensor | None = None, scale: int = 2) -> Tensor:
            if opaque and self.start.sum() > 99:
                return self.start
            return self.lin(self.start if x is None else x) * scale

    model = Own()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(S), layer="Linear", on="output"))
    assert ("" in fxreg.explain(gm).opaque) == opaque
    assert torch.allclose(fxreg.penalties(gm)["l1"], S * model.lin(model.start).abs().sum())


@pytest.mark.parametrize("fake", [lambda a: 0.5 * a.abs().sum(), lambda a: a.abs().sum() * 0], ids=["half", "none"])
def test_verify_rejects_a_graph_with_another_penalty(fake: Callable[[Tensor], Tensor]) -> None:
    model, x = build(Net)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(S), layer="Tanh", on="output"))
    fxreg.verify(gm, model, (x,))
    (node,) = (node for node in gm.graph.nodes if node.name == "body_act_l1")
    with gm.graph.inserting_before(node):
        node.replace_all_uses_with(gm.graph.call_function(fake, (node.args[0],)))
    gm.recompile()
    with pytest.raises(fxreg.VerifyError, match="gradient of"):
        fxreg.verify(gm, model, (x,))


def test_a_parameter_that_a_layer_is_given_is_its_input() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Parameter(torch.randn(4, 3)), nn.LayerNorm(3)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.norm(self.table).T

    model, x = Normed(), torch.randn(5, 3)
    rule = fxreg.Rule(fxreg.l1(S), name="norm", on="input")
    for examples in (None, (x,)):
        gm = fxreg.transform(model, rule, example_inputs=examples)
        assert_same(trained(gm, model, x), expected(model, x, {"norm"}.__contains__, "input"), 1e-5)


@pytest.mark.parametrize("how", ["DistributedDataParallel", "fully_shard", "fully_shard, by layer"])
@pytest.mark.parametrize("case", ["layer", "container", "inside opaque", "a structure"])
def test_on_a_mesh_it_is_the_same(case: str, how: str, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    kind, keys, on, names = CASES[case]
    model, x = build(kind)
    wanted = expected(model, x, names.__contains__, on)
    gm: Any = fxreg.transform(model, fxreg.Rule(fxreg.l1(S), on=on, **keys))
    if how == "DistributedDataParallel":
        gm = nn.parallel.DistributedDataParallel(gm)
    else:
        layers = (module for module in model.modules() if isinstance(module, nn.Linear))
        for layer in [*layers] if how == "fully_shard, by layer" else ():
            fully_shard(layer, mesh=mesh)
        fully_shard(gm, mesh=mesh)
    gm(x).square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert_same({name: getattr(g, "full_tensor", lambda g=g: g)() for name, g in found.items()}, wanted, 1e-5)


@pytest.mark.parametrize("case", ["layer", "twice", "in place"])
def test_a_checkpoint_around_the_module_changes_nothing(case: str) -> None:
    kind, keys, on, names = CASES[case]
    model, x = build(kind)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(S), on=on, **keys))
    output = torch.utils.checkpoint.checkpoint(gm, x, use_reentrant=False)
    output.square().mean().backward()
    assert_same(
        {name: p.grad for name, p in model.named_parameters()}, expected(model, x, names.__contains__, on), 1e-5
    )


def test_a_checkpoint_inside_what_is_opaque_changes_nothing() -> None:
    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Linear(3, 4), Block()

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.block, self.stem(x), use_reentrant=False)

    model, x = Saving(), torch.randn(5, 3)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(S), layer="Tanh", on="output"))
    assert_same(trained(gm, model, x), expected(model, x, {"block.act"}.__contains__), 1e-5)


class Reentrant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(3, 4), Block()

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.block, self.stem(x), use_reentrant=True)


@pytest.mark.parametrize("examples", [False, True], ids=["", "verified"])
def test_a_reentrant_checkpoint_inside_what_is_opaque_is_an_error(examples: bool) -> None:
    model, x = Reentrant(), torch.randn(5, 3)
    rule = fxreg.Rule(fxreg.l1(S), layer="Tanh", on="output")
    with pytest.raises(fxreg.CaptureError, match=r"output of block.act: the module runs inside a reentrant checkpoint"):
        fxreg.transform(model, rule, example_inputs=(x,) if examples else None)(x)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(S), name="", on="output"))  # the region's own output
    twin = copy.deepcopy(model)
    output = twin(x)
    (output.square().mean() + l1(output)).backward()
    assert_same(trained(gm, model, x), {name: p.grad for name, p in twin.named_parameters()}, 1e-5)


class Borrowing(Gate):
    """Opaque, and calls a module that is another's."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.others = [other]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.others[0](x))


@pytest.mark.parametrize("examples", [False, True], ids=["", "verified"])
def test_what_an_opaque_module_reaches_past_its_registered_modules_is_refused(examples: bool) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(5, 4)
    model.append(Borrowing(model[0]))
    given = (x,) if examples else None
    with pytest.raises(fxreg.CaptureError, match=r"output of 0\): 2, which runs as it is .*, reaches it past"):
        fxreg.transform(model, fxreg.Rule(fxreg.l1(S), name="0", on="output"), example_inputs=given)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(S), name="1", on="output"), example_inputs=given)
    assert_same(trained(gm, model, x), expected(model, x, {"1"}.__contains__), 1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_what_is_inside_a_scripted_module_is_refused() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    for model, name in ((scripted, "0"), (nn.Sequential(scripted, nn.Linear(4, 4)), "0.0")):
        with pytest.raises(fxreg.CaptureError, match=r"it is inside (0|the model), which is scripted"):
            fxreg.transform(model, fxreg.Rule(fxreg.l1(S), name=name, on="output"))


def test_penalties_take_inputs_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, *, ids: Tensor) -> Tensor:
            return self.linear(ids)

    model, x = Named(), torch.randn(2, 4)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(S), layer="Linear", on="output"), example_inputs={"ids": x})
    wanted = S * (x @ model.linear.weight.T + model.linear.bias).abs().sum()
    torch.testing.assert_close(fxreg.penalties(gm, ids=x)["l1"], wanted.detach())
