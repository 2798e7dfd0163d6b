"""train_step is the ordinary loop in one graph: forward, backward, penalties, update."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch.optim import SGD, Adam, AdamW, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

import fxreg
from fxreg import calls
from fxreg.updates import has_moved

from .marks import slow_but
from .models import build
from .reference import Term, by_hand, is_weight, penalty_terms, transform_terms, weights
from .reference import assert_same as assert_gradients
from .test_compile import Ops
from .test_contexts import EMITS, WithLoss

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

HALF = torch.tensor(0.5, dtype=torch.float64)
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: SGD(p, lr=0.05),
    "sgd decayed": lambda p: SGD(p, lr=0.05, weight_decay=0.1),
    "sgd with momentum": lambda p: SGD(p, lr=0.05, momentum=0.8),
    "nesterov": lambda p: SGD(p, lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.1),
    "dampened": lambda p: SGD(p, lr=0.05, momentum=0.8, dampening=0.3, weight_decay=0.1),
    "sgd upwards": lambda p: SGD(p, lr=0.01, momentum=0.8, maximize=True, weight_decay=0.1),
    "sgd fused": lambda p: SGD(p, lr=0.05, momentum=0.8, fused=True),
    "adam": lambda p: Adam(p, lr=0.02),
    "adam decayed": lambda p: Adam(p, lr=0.02, betas=(0.4, 0.7), eps=1e-3, weight_decay=0.1),
    "amsgrad": lambda p: Adam(p, lr=0.02, amsgrad=True, foreach=True),
    "adam upwards": lambda p: Adam(p, lr=0.01, maximize=True, weight_decay=0.1),
    "adam fused": lambda p: Adam(p, lr=0.02, fused=True),
    "adam decoupled": lambda p: Adam(p, lr=0.02, weight_decay=0.1, decoupled_weight_decay=True),
    "adamw": lambda p: AdamW(p, lr=0.02, weight_decay=0.1),
    "adamw with a tensor": lambda p: AdamW(p, lr=torch.tensor(0.02, dtype=torch.float64), amsgrad=True),
    "adam with tensors": lambda p: Adam(p, betas=(HALF, HALF), foreach=False),
    "two groups": lambda p: SGD([{"params": p[:1], "momentum": 0.8}, {"params": p[1:], "lr": 0.01}], lr=0.05),
}


def group_lasso_terms() -> list[Term]:
    return [
        Term(
            fxreg.Rule(fxreg.group_lasso(0.02, dim=0), **weights(), exclude="*norm*"),
            lambda name: is_weight(name) and "norm" not in name,
            penalty=lambda w: 0.02 * w.flatten(1).norm(dim=1).sum() if w.ndim > 1 else 0.02 * w.abs().sum(),
        )
    ]


RULES: dict[str, Callable[[], list[Term]]] = {
    "none": list,
    "penalties": lambda: penalty_terms("penalty"),
    "gradients": lambda: penalty_terms("gradient"),
    "groups": group_lasso_terms,
    "clipped": lambda: [*transform_terms(), *penalty_terms("penalty")],
}


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean() + (output.softmax(-1) * output.tanh()).mean()


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False)).double()


class Trial:
    """A model to train in one graph, and its twin to train by hand."""

    def __init__(self, name: str, terms: list[Term], emit: str = "backward") -> None:
        model, self.inputs = (tiny(), (torch.randn(5, 4).double(),)) if name == "tiny" else build(name, torch.float64)
        self.target = torch.randn_like(model(*self.inputs))
        self.model = WithLoss(model) if emit == "loss" else model
        self.twin = copy.deepcopy(self.model)
        self.terms, self.emit = terms, emit
        self.gm = fxreg.transform(self.model, [term.rule for term in terms], emit=emit)

    def by_hand(self, optimizer: torch.optim.Optimizer, steps: int, schedule: Any = None) -> list[Tensor]:
        losses = []
        for k in range(steps):
            torch.manual_seed(k)
            output = self.twin(*self.inputs)
            loss = output["loss"] if self.emit == "loss" else loss_of(output, self.target)
            gradients = by_hand(self.twin, loss, self.terms)
            for name, parameter in self.twin.named_parameters():
                parameter.grad = gradients.get(name)
            if self.emit != "backward":
                chosen = [(term, p) for term in self.terms for n, p in self.twin.named_parameters() if term.acts_on(n)]
                loss = loss + sum(t.penalty(p) for t, p in chosen if t.penalty and t.via == "penalty")
            losses.append(loss.detach())
            optimizer.step()
            if schedule:
                schedule.step()
        return losses

    def step(self, optimizer: torch.optim.Optimizer, **options: Any) -> Callable[[], Tensor]:
        options = {"backend": "aot_eager", **options}
        if self.emit == "loss":
            step = fxreg.train_step(self.gm, lambda output: output["loss"], optimizer, **options)
            return lambda: step(self.inputs)
        step = fxreg.train_step(self.gm, loss_of, optimizer, **options)
        return lambda: step(self.inputs, self.target)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def assert_same(self, tolerance: float = 1e-12) -> None:
        for (name, actual), expected in zip(self.model.named_parameters(), self.twin.parameters(), strict=True):
            torch.testing.assert_close(
                actual, expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert actual.grad is None
        for actual, expected in zip(self.model.buffers(), self.twin.buffers(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_same_state(actual: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    one, other = actual.state_dict(), expected.state_dict()
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for number, state in other["state"].items():
        assert one["state"][number].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(one["state"][number][name], value, rtol=1e-12, atol=1e-12)


def compare(trial: Trial, make: Make, steps: int = 20, **options: Any) -> None:
    optimizer, reference = make(trial.parameters()), make(list(trial.twin.parameters()))
    step = trial.step(optimizer, **options)
    losses = []
    for k in range(steps):
        torch.manual_seed(k)
        losses.append(step())
    expected = trial.by_hand(reference, steps)
    trial.assert_same()
    assert_same_state(optimizer, reference)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", slow_but(["sgd with momentum", "adam"], OPTIMIZERS))
def test_every_optimizer_steps_as_in_the_ordinary_loop(name: str) -> None:
    compare(Trial("tiny", RULES["groups"]()), OPTIMIZERS[name])


class Gained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.linspace(-1, 1, 3)), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * self.gain


@pytest.mark.parametrize("name", ["sgd with momentum", "adam"])
@pytest.mark.slow
def test_states_that_are_one_number_are_written_in_float64_too(name: str) -> None:
    """Dynamo takes a 0-d float64 tensor for a number: Adam's step counter, and all that a 0-d parameter has."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model, twin = Gained(), Gained()
        gm = fxreg.transform(model, fxreg.Rule(fxreg.l2(0.1)))
        optimizer, reference = OPTIMIZERS[name]([*model.parameters()]), OPTIMIZERS[name]([*twin.parameters()])
        step = fxreg.train_step(gm, torch.sum, optimizer, backend="aot_eager")
        for k in range(3):
            x = torch.full((3,), 1.0 + k)
            step(x)
            reference.zero_grad()
            (twin(x).sum() + 0.1 * sum((p * p).sum() for p in twin.parameters())).backward()
            reference.step()
    finally:
        torch.set_default_dtype(usual)
    for actual, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert_same_state(optimizer, reference)


CASES = [(rules, "backward") for rules in RULES] + [(r, emit) for r in ("penalties", "clipped") for emit in EMITS[1:]]


@pytest.mark.parametrize(("rules", "emit"), slow_but([("penalties", "backward")], CASES))
def test_every_rule_acts_as_in_the_ordinary_loop(rules: str, emit: str) -> None:
    compare(Trial("mlp", RULES[rules](), emit), OPTIMIZERS["sgd with momentum"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "emit"), [("cnn", "backward"), ("transformer", "loss"), ("opaque", "output")])
def test_every_model_trains_as_in_the_ordinary_loop(name: str, emit: str) -> None:
    """With dropout, a running mean, a tied weight; and where the root is one opaque call."""
    compare(Trial(name, RULES["clipped"](), emit), OPTIMIZERS["nesterov"])


@pytest.mark.slow
@pytest.mark.parametrize(("make", "emit"), [("nesterov", "backward"), ("dampened", "output"), ("adam decayed", "loss")])
def test_inductor(make: str, emit: str) -> None:
    """A decay is where its fusion of a sum with a matrix product goes wrong."""
    compare(Trial("tiny", RULES["penalties"](), emit), OPTIMIZERS[make], steps=5, backend="inductor")


@pytest.mark.parametrize("name", slow_but(["nesterov"], ["nesterov", "adam decayed", "adamw with a tensor"]))
@pytest.mark.slow
def test_schedules_of_numbers_and_strengths_compile_nothing_anew(name: str) -> None:
    trial, backend = Trial("tiny", []), CompileCounterWithBackend("aot_eager")
    trial.gm = fxreg.transform(trial.model, [fxreg.Rule(fxreg.l1(1.0))])
    optimizer, reference = OPTIMIZERS[name](trial.parameters()), OPTIMIZERS[name](list(trial.twin.parameters()))
    step = trial.step(optimizer, backend=backend)
    schedules = [lr_scheduler.LambdaLR(one, lambda k: k / 5) for one in (optimizer, reference)]  # the first rate is 0
    for k in range(8):
        for one in (optimizer, reference):
            group = one.param_groups[0]
            group["weight_decay"] = 0.01 * (k + 1)
            group.update({"betas": (0.1 * k, 0.9)} if "betas" in group else {"momentum": 0.1 * (k + 1)})
        fxreg.strengths(trial.gm)["l1"] = strength = 0.1 * k
        trial.terms = [Term(fxreg.Rule(fxreg.l1(1.0)), lambda n: True, penalty=lambda w, s=strength: s * w.abs().sum())]
        step()
        trial.by_hand(reference, 1)
        for schedule in schedules:
            schedule.step()
        trial.assert_same()
    assert backend.frame_count == 1


@pytest.mark.slow
def test_an_option_that_is_switched_holds_from_the_next_step_on() -> None:
    trial = Trial("tiny", [])
    optimizer, reference = OPTIMIZERS["sgd"](trial.parameters()), OPTIMIZERS["sgd"](list(trial.twin.parameters()))
    step = trial.step(optimizer)
    for change in ({"momentum": 0.8}, {"momentum": 0.5, "nesterov": True}, {"nesterov": False, "weight_decay": 0.1}):
        for one in (optimizer, reference):
            one.param_groups[0].update(change)
        step()
        trial.by_hand(reference, 1)
        trial.assert_same()


@pytest.mark.slow
def test_other_steps_do_not_count_towards_the_limit_of_recompilations() -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(3):
            trial = Trial("tiny", [])
            trial.step(OPTIMIZERS["sgd"](trial.parameters()), backend="eager")()


@pytest.mark.parametrize(
    ("name", "first"),
    slow_but([("dampened", "loop")], [("sgd with momentum", "step"), ("dampened", "loop"), ("adam", "step")]),
)
@pytest.mark.slow
def test_the_state_goes_from_the_step_to_the_ordinary_loop_and_back(name: str, first: str) -> None:
    trial, make = Trial("tiny", RULES["penalties"]()), OPTIMIZERS[name]
    optimizer, reference = make(trial.parameters()), make(list(trial.twin.parameters()))
    for kind in (first, "loop" if first == "step" else "step", first):
        resumed = make(trial.parameters())
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer = resumed
        step = trial.step(optimizer)
        for k in range(3):
            torch.manual_seed(k)
            if kind == "step":
                step()
                continue
            optimizer.zero_grad()
            loss_of(trial.gm(*trial.inputs), trial.target).backward()
            optimizer.step()
        optimizer.zero_grad()
        trial.by_hand(reference, 3)
        trial.assert_same()
        assert_same_state(optimizer, reference)


def test_a_scheduler_behind_the_step_does_not_warn_and_one_before_it_does() -> None:
    trial = Trial("tiny", [])
    optimizer = OPTIMIZERS["sgd"](trial.parameters())
    step = trial.step(optimizer)
    schedule = lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        schedule.step()
    schedule = lr_scheduler.StepLR(optimizer, 1)
    step()
    schedule.step()


@pytest.mark.slow
def test_hooks_behind_the_step_see_the_new_parameters() -> None:
    trial = Trial("mlp", [])
    optimizer, weight = OPTIMIZERS["sgd"](trial.parameters()), trial.model.fc1.weight
    seen: list[Any] = []

    def look(*given: Any) -> None:
        moved = [name for name, parameter in trial.model.named_parameters() if has_moved(optimizer, parameter)]
        seen.append((given, weight.detach().clone(), moved))

    optimizer.register_step_post_hook(look)
    trial.step(optimizer)()
    ((given, found, moved),) = seen
    assert given == (optimizer, (optimizer,), {})
    torch.testing.assert_close(found, weight)
    assert not torch.equal(found, trial.twin.fc1.weight)
    assert moved == [f"fc{k}.{kind}" for k in (1, 2, 3) for kind in ("weight", "bias")]
    assert not has_moved(optimizer, weight)


def test_a_proximal_step_follows() -> None:
    trial = Trial("mlp", [])
    trial.gm = fxreg.transform(trial.model, [fxreg.Rule(fxreg.l1(0.5), via="proximal")])
    optimizer, reference = OPTIMIZERS["sgd"](trial.parameters()), OPTIMIZERS["sgd"](list(trial.twin.parameters()))
    fxreg.ProximalStep(optimizer, trial.gm)
    step = trial.step(optimizer)
    for _ in range(3):
        step()
        trial.by_hand(reference, 1)
        for parameter in trial.twin.parameters():
            if parameter.grad is not None:
                parameter.data = parameter.sign() * (parameter.abs() - 0.05 * 0.5).clamp(0).data
        trial.assert_same()
    assert not trial.model.fc3.weight.all()


@pytest.mark.parametrize("emit", slow_but(["backward"], EMITS))
@pytest.mark.slow
def test_penalties_on_activations_and_on_parameters(emit: str) -> None:
    trial = Trial("tiny", RULES["penalties"](), emit)
    rules = [fxreg.Rule(fxreg.l2(0.3), layer="Tanh", on="output"), *(term.rule for term in trial.terms)]
    trial.gm = fxreg.transform(trial.model, rules, emit=emit)
    trial.step(SGD(trial.parameters(), lr=0.1))()
    inner = trial.twin.model if emit == "loss" else trial.twin
    hidden = inner[:2](*trial.inputs)
    loss = trial.twin(*trial.inputs)["loss"] if emit == "loss" else loss_of(inner(*trial.inputs), trial.target)
    gradients = by_hand(trial.twin, loss + 0.3 * hidden.square().sum(), trial.terms)
    for name, parameter in trial.twin.named_parameters():
        parameter.data -= 0.1 * gradients[name]
    trial.assert_same()


@pytest.mark.slow
def test_what_has_no_gradient_is_left_alone() -> None:
    trial = Trial("mlp", [])
    trial.model.fc3.weight.requires_grad_(False)
    trial.gm = fxreg.transform(
        trial.model, [fxreg.Rule(fxreg.freeze(), name="fc2"), fxreg.Rule(fxreg.l1(0.1), name="fc3")]
    )
    optimizer = OPTIMIZERS["adamw"](trial.parameters())
    step = trial.step(optimizer)
    step()
    moved = {
        n for (n, p), q in zip(trial.model.named_parameters(), trial.twin.parameters(), strict=True) if not p.equal(q)
    }
    assert moved == {"fc1.weight", "fc1.bias", "fc3.bias"}
    assert set(optimizer.state) == {dict(trial.model.named_parameters())[name] for name in moved}


def test_the_loss_scale_is_followed() -> None:
    trial = Trial("tiny", RULES["penalties"]())
    step = fxreg.train_step(
        trial.gm, lambda *given: loss_of(*given) / 4, SGD(trial.parameters(), lr=0.05), backend="aot_eager"
    )
    fxreg.set_loss_scale(trial.gm, 1 / 4)
    step(trial.inputs, trial.target)
    trial.by_hand(SGD(trial.twin.parameters(), lr=0.05 / 4), 1)
    trial.assert_same()


@pytest.mark.parametrize("training", slow_but([True], [True, False]))
@pytest.mark.slow
def test_a_loss_that_is_weighted_weights_its_penalty(training: bool) -> None:
    trial = Trial("tiny", RULES["penalties"](), "loss")
    trial.gm.train(training)
    optimizer = SGD(trial.parameters(), lr=0.05)
    fxreg.train_step(trial.gm, lambda output: 3 * output["loss"], optimizer, backend="aot_eager")(*trial.inputs)
    trial.terms = trial.terms if training else []
    trial.by_hand(SGD(trial.twin.parameters(), lr=0.15), 1)
    trial.assert_same()


class Scaled(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return (weight * (self.scale * output - target).square()).mean()


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.inner(x - y)


@pytest.mark.slow
def test_named_inputs_several_targets_and_a_loss_with_parameters() -> None:
    model, loss_fn = TwoInputs(), Scaled()
    twins = copy.deepcopy((model, loss_fn))
    gm = fxreg.transform(model, [fxreg.Rule(fxreg.l2(0.1))])
    step = fxreg.train_step(gm, loss_fn, SGD([*model.parameters(), *loss_fn.parameters()], lr=0.1), backend="aot_eager")
    x, y, target, weight = (torch.randn(5, n).double() for n in (4, 4, 2, 2))
    step({"y": y, "x": x}, target, weight)
    loss = twins[1](twins[0](x, y), target, weight) + 0.1 * sum(p.square().sum() for p in twins[0].parameters())
    loss.backward()
    for one, other in zip((model, loss_fn), twins, strict=True):
        for actual, expected in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(actual, expected.detach() - 0.1 * expected.grad)


@pytest.mark.parametrize("emit", slow_but(["backward"], EMITS))
@pytest.mark.slow
def test_the_module_compiles_by_itself_before_and_behind_a_step(emit: str) -> None:
    trial, backend = Trial("tiny", RULES["penalties"](), emit), CompileCounterWithBackend("aot_eager")
    optimizer = SGD(trial.parameters(), lr=0.0)
    step, compiled = trial.step(optimizer), torch.compile(trial.gm, backend=backend)
    for _ in range(2):
        output = compiled(*trial.inputs)
        loss = output["loss"] if emit == "loss" else loss_of(output[0] if emit == "output" else output, trial.target)
        (loss + output[1] if emit == "output" else loss).backward()
        plain = trial.twin(*trial.inputs)
        expected = by_hand(trial.twin, plain["loss"] if emit == "loss" else loss_of(plain, trial.target), trial.terms)
        assert_gradients({name: p.grad for name, p in trial.model.named_parameters()}, expected, 1e-12)
        optimizer.zero_grad()
        step()
    assert backend.frame_count == 1


class Leaky(torch.autograd.Function):
    """Of the old style, with a backward that is not its forward's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.where(x > 0, 1.0, 0.3)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3).double(), nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(lambda x: Leaky.apply(self.first(x)).tanh(), x, use_reentrant=False))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
@pytest.mark.slow
def test_checkpoints_and_functions_with_a_backward_of_their_own() -> None:
    trial = Trial("tiny", RULES["penalties"]())
    trial.model = Odd()
    trial.twin = copy.deepcopy(trial.model)
    trial.gm = fxreg.transform(trial.model, [term.rule for term in trial.terms])
    compare(trial, OPTIMIZERS["sgd"], steps=2)


def in_full_precision(output: Tensor, target: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return loss_of(output.float() @ torch.ones(2, 2), target)


@pytest.mark.slow
def test_autocast_around_the_step_is_around_the_forward_pass_alone() -> None:
    trial = Trial("tiny", RULES["penalties"]())
    trial.model.float()
    trial.twin.float()
    trial.inputs, trial.target = (trial.inputs[0].float(),), trial.target.float()
    step = fxreg.train_step(trial.gm, in_full_precision, SGD(trial.parameters(), lr=0.1), backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(trial.inputs, trial.target)
        loss = in_full_precision(trial.twin(*trial.inputs), trial.target)
    gradients = by_hand(trial.twin, loss, trial.terms)
    for name, parameter in trial.twin.named_parameters():
        parameter.data -= 0.1 * gradients[name]
    trial.assert_same(1e-6)


def test_without_a_compiler_the_same_code_runs() -> None:
    trial = Trial("mlp", RULES["clipped"]())
    with torch.compiler.set_stance("force_eager"):
        compare(trial, OPTIMIZERS["adam"], steps=3)
    assert calls.apart.zero is None


WAITS = {"item", "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select"}


@pytest.mark.parametrize("emit", slow_but(["backward"], EMITS))
@pytest.mark.slow
def test_nothing_in_a_step_waits_for_the_device(emit: str) -> None:
    """By construction: no operator of a step, in or around its graph, brings a value to Python."""
    effects = [fxreg.Rule(fxreg.l1(0.1)), fxreg.Rule(fxreg.l2(0.1), via="gradient"), fxreg.Rule(fxreg.entropy(0.1))]
    effects += [fxreg.Rule(fxreg.clip_norm(1.0)), fxreg.Rule(fxreg.zero_nans()), fxreg.Rule(fxreg.add_noise(0.1))]
    trial = Trial("tiny", [], emit)
    trial.gm = fxreg.transform(trial.model, effects, emit=emit)
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    step = trial.step(OPTIMIZERS["adamw with a tensor"](trial.parameters()), backend=aot_autograd(fw_compiler=keep))
    step()
    (graph,) = graphs
    found = {str(node.target) for node in graph.graph.nodes}
    assert len(found) > 10
    with torch.compiler.set_stance("force_eager"), Ops() as eager:
        step()
    assert sum(eager.seen.values()) > len(found)
    assert not [op for op in (*found, *eager.seen) if not WAITS.isdisjoint(op.split("."))]


class Break(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.sum() > 0) else -x


def refused(make: Make = OPTIMIZERS["sgd"], loss_fn: Any = loss_of, change: Any = None, model: Any = None) -> str:
    """The error of making a step, or of taking one: after which nothing is changed."""
    trial = Trial("tiny", [])
    trial.model = model or trial.model
    trial.twin = copy.deepcopy(trial.model)
    gm = fxreg.transform(trial.model, [fxreg.Rule(fxreg.l1(0.1), param="weight")])
    optimizer = make(trial.parameters())
    if change:
        change(optimizer, trial.parameters()[0])
    with pytest.raises(fxreg.FxregError, match="train_step: ") as caught:
        fxreg.train_step(gm, loss_fn, optimizer, backend="aot_eager")(trial.inputs, trial.target)
    trial.assert_same(0)
    assert not optimizer.state
    return str(caught.value)


def test_what_has_no_formula_is_refused_by_name() -> None:
    class Mine(SGD):
        pass

    assert "torch.optim.rmsprop.RMSprop" in refused(torch.optim.RMSprop)
    assert "Mine" in refused(Mine)
    assert "differentiable=True" in refused(lambda p: Adam(p, differentiable=True))
    assert "was replaced by" in refused(change=lambda o, p: setattr(o, "step", lambda: None))
    assert "complex" in refused(model=nn.Sequential(tiny(), Phase()))


class Phase(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones((), dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.phase).real


def test_what_a_graph_would_pass_by_is_refused() -> None:
    assert "hook before its step" in refused(change=lambda o, p: o.register_step_pre_hook(lambda *given: None))
    for kind in ("register_hook", "register_post_accumulate_grad_hook"):
        message = refused(change=lambda o, p, kind=kind: getattr(p, kind)(lambda *given: None))
        assert "parameter '0.weight' has a hook on its gradient" in message
    handle = register_optimizer_step_pre_hook(lambda *given: None)
    assert "hook before its step" in refused()
    handle.remove()
    scaler = torch.amp.GradScaler("cpu")
    assert "GradScaler.scale" in refused(loss_fn=lambda *given: scaler.scale(loss_of(*given)))
    hooked = tiny()
    hooked[2].register_full_backward_hook(lambda *given: None)
    assert "backwards hooks" in refused(model=hooked)


def test_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert "2 ranks are training" in refused()


def test_parameters_that_are_not_plain_tensors_are_refused() -> None:
    class Sharded(Tensor):
        pass

    def shard(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
        optimizer.param_groups[0]["params"][0] = parameter.detach().as_subclass(Sharded).requires_grad_()

    assert "is a Sharded, not a plain tensor" in refused(change=shard)


def test_a_step_that_is_not_one_graph_says_why() -> None:
    assert "loss_fn must return a 0-d tensor, got shape (5, 2)" in refused(
        loss_fn=lambda output, target: output - target
    )
    assert "loss_fn must return a 0-d tensor, got float" in refused(loss_fn=lambda *given: 1.0)
    assert "as one graph" in refused(loss_fn=lambda output, target: loss_of(output, target).item())
    assert "as one graph" in refused(model=nn.Sequential(tiny(), Break()))


def test_other_modules_are_refused() -> None:
    with pytest.raises(fxreg.FxregError, match=r"a module that fxreg\.transform returned, got Sequential"):
        fxreg.train_step(tiny(), loss_of, SGD(tiny().parameters()))
    trial = Trial("tiny", [])
    with pytest.raises(fxreg.FxregError, match="holds none of the module's parameters"):
        fxreg.train_step(trial.gm, loss_of, SGD(tiny().parameters()))


class Holding(nn.Module):
    """Calls a module that is none of its children."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = [inner], nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.inner[0](x))


@pytest.mark.parametrize("rules", [[], [fxreg.Rule(fxreg.l2(0.1))]], ids=["without rules", "with one"])
@pytest.mark.parametrize("emit", ["backward", "output"])
def test_another_emitted_module_with_penalties_is_refused(emit: Any, rules: list[fxreg.Rule]) -> None:
    inner = fxreg.transform(nn.Linear(3, 3), fxreg.Rule(fxreg.l1(0.1)))
    gm = fxreg.transform(Holding(inner), rules, emit=emit)
    step = fxreg.train_step(gm, nn.functional.mse_loss, SGD(gm.parameters(), lr=0.1), backend="aot_eager")
    with pytest.raises(fxreg.FxregError, match=r"another module that fxreg\.transform returned"):
        step(torch.ones(2, 3), torch.ones(2, 3))


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square().mean()


@pytest.mark.parametrize(
    ("default", "dtype"), [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)], ids=str
)
def test_how_often_a_penalty_counts_is_not_rounded(default: torch.dtype, dtype: torch.dtype) -> None:
    model, x = Squared().to(dtype), torch.randn(6, 4, dtype=dtype)
    twin, before = copy.deepcopy(model), torch.get_default_dtype()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(10.0)), emit="loss")
    torch.set_default_dtype(default)
    try:
        fxreg.train_step(gm, lambda loss: loss / 3, SGD(model.parameters(), lr=0.1), backend="aot_eager")(x)
    finally:
        torch.set_default_dtype(before)
    ((twin(x) + 10.0 * sum(p.abs().sum() for p in twin.parameters())) / 3).backward()
    SGD(twin.parameters(), lr=0.1).step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=4 * torch.finfo(dtype).eps)
