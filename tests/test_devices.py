"""On every device that there is, training is that of the model plus its penalty: by each lowering, eager, compiled, in
CUDA graphs and as a whole step; and no step waits for the device.

CI has no GPU. Where there is one, these tests take it, too: `pytest tests/test_devices.py`.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.optim import SGD, Adam, AdamW

import fxreg

from .models import build
from .reference import Term, assert_same, by_hand, everything, is_weight, objective, transform_terms, weights
from .test_compile import Ops
from .test_registry import EXAMPLES, WAYS, eager, net
from .test_stepping import WAITS

CPU = torch.device("cpu")
GPUS = [torch.device("cuda")] if torch.cuda.is_available() else []
pytestmark = [  # what torch says on a GPU of itself, and of what a user might want
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix mult:UserWarning"),
]
COMPILERS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"backend": "aot_eager"},
    "graphs": {"mode": "reduce-overhead"},
    "tuned": {"mode": "max-autotune"},
}
MODELS = {"eager": ("mlp", "transformer", "lstm", "opaque"), "compiled": ("mlp", "transformer", "opaque")}
"""Dynamo runs recurrent layers as they are."""
CELLS = [(CPU, how, model) for how, models in MODELS.items() for model in models[: 4 if how == "eager" else 1]]
CELLS += [(gpu, how, model) for gpu in GPUS for how in COMPILERS for model in MODELS.get(how, ("mlp", "transformer"))]

on_each_device = pytest.mark.parametrize("device", [CPU, *GPUS], ids=str)


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """What waits for the device is an error."""
    if device.type == "cpu":
        with Ops() as ops:
            yield
        assert not [op for op in ops.seen if not WAITS.isdisjoint(op.split("."))]
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_close(model: nn.Module, twin: nn.Module, tolerance: float) -> None:
    """The parameters of one and the other."""
    actual, expected = ({name: p.detach().cpu() for name, p in one.named_parameters()} for one in (model, twin))
    assert_same(dict(actual), dict(expected), tolerance)


ASK = ("nuclear_norm",)
"""torch.linalg.svd asks a GPU whether it converged."""


@on_each_device
@pytest.mark.parametrize(("name", "via"), WAYS)
def test_every_effect_is_what_it_is_in_float64_on_the_cpu(name: str, via: Any, device: torch.device) -> None:
    rule = fxreg.Rule(EXAMPLES[name].effect, param="weight", via=via)
    model, x = net()
    reference = fxreg.transform(copy.deepcopy(model).double(), rule)
    reference(x.double())
    expected = eager(reference, x.double())
    gm = fxreg.transform(model.to(device), rule)
    x, index = x.to(device), torch.arange(1.0, 13.0, device=device).reshape(3, 4)
    parameters = dict(gm.named_parameters())
    gm(x)  # the first call reads the device's properties
    with nullcontext() if name in ASK and device in GPUS else no_waiting(device):
        found = torch.autograd.grad((gm(x) * index).square().mean(), [*parameters.values()], allow_unused=True)
    assert {one.device.type for one in found if one is not None} <= {device.type}
    assert_same({n: None if g is None else g.cpu() for n, g in zip(parameters, found, strict=True)}, expected, 2e-5)


STRENGTHS = {"l1": 0.013, "l2": 0.07}


def terms_of(strengths: dict[str, float], via: str, clipped: bool = False) -> list[Term]:
    """As in other tests, but with strengths that change."""
    l1, l2 = (getattr(fxreg, name)(strengths[name]) for name in ("l1", "l2"))
    return [
        *(transform_terms() if clipped else []),
        Term(fxreg.Rule(l1, **weights(), via=via), is_weight, lambda w: strengths["l1"] * w.abs().sum(), via=via),
        Term(fxreg.Rule(l2, via=via), everything, lambda w: strengths["l2"] * (w * w).sum(), via=via),
    ]


@pytest.mark.parametrize("emit", ["backward", "output"])
@pytest.mark.parametrize("what", ["penalty", "gradient", "clipped"])
@pytest.mark.parametrize(("device", "how", "model"), CELLS, ids=str)
def test_training_is_that_of_the_hand_written_loss(
    device: torch.device, how: str, model: str, what: str, emit: str
) -> None:
    """In five steps, with strengths and the scale of the loss that change between them."""
    original, inputs = build(model)
    inputs = tuple(x.to(device) for x in inputs)
    strengths = dict(STRENGTHS)
    terms = terms_of(strengths, "penalty" if what == "clipped" else what, what == "clipped")
    twin = copy.deepcopy(original).to(device)
    gm = fxreg.transform(original, [term.rule for term in terms], emit=emit).to(device)
    options = {"mode": "default"} if how == "compiled" and device in GPUS else COMPILERS[how]
    run: Any = torch.compile(gm, **options) if options else gm
    optimizer, reference = (torch.optim.SGD(one.parameters(), lr=0.1) for one in (gm, twin))
    scale = torch.ones((), device=device)
    for k in range(5):
        factor = 2.0**k
        wanted = by_hand(twin, objective(twin(*inputs)), terms, factor)
        for name, parameter in twin.named_parameters():
            gradient = wanted[name]
            parameter.grad = None if gradient is None else gradient / factor
        reference.step()
        torch.compiler.cudagraph_mark_step_begin()
        with no_waiting(device) if k > 2 and device in GPUS else nullcontext():
            fxreg.set_loss_scale(gm, scale)
            output = run(*inputs)
            loss = objective(output) if emit == "backward" else objective(output[0]) + output[1]
            (loss * scale).backward()
            for parameter in gm.parameters():
                if parameter.grad is not None:
                    parameter.grad /= scale
            optimizer.step()
            optimizer.zero_grad()
            for name in ("l1", "l2"):
                strengths[name] *= 1.5
                fxreg.strengths(gm)[name] = strengths[name]
            scale *= 2
    assert_close(gm, twin, 1e-4)
    if how == "graphs":
        assert not counters["inductor"]["cudagraph_skips"]


@on_each_device
@pytest.mark.parametrize("make", [SGD, AdamW])
@pytest.mark.slow
def test_a_whole_step_is_the_ordinary_loops(make: Any, device: torch.device) -> None:
    original, inputs = build("mlp")
    inputs, rules = tuple(x.to(device) for x in inputs), [term.rule for term in terms_of(STRENGTHS, "penalty", True)]
    models = [fxreg.transform(copy.deepcopy(original).to(device), rules) for _ in range(2)]
    optimizer, reference = (make(one.parameters(), lr=0.01) for one in models)
    options = {"mode": "reduce-overhead"} if device in GPUS else {"backend": "aot_eager"}
    step = fxreg.train_step(models[0], objective, optimizer, **options)
    for k in range(5):
        with no_waiting(device) if k > 2 and device in GPUS else nullcontext():
            step(inputs)
        optimizer.param_groups[0]["lr"] *= 0.9
        reference.zero_grad()
        objective(models[1](*inputs)).backward()
        reference.step()
        reference.param_groups[0]["lr"] *= 0.9
    assert_close(*models, 1e-4)
    states, others = (one.state_dict()["state"] for one in (optimizer, reference))
    torch.testing.assert_close(states, others, rtol=1e-4, atol=1e-6)
    if device in GPUS:
        assert not counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("make", [SGD, Adam, AdamW])
@pytest.mark.slow
def test_a_whole_step_needs_no_value_on_the_host(make: Any) -> None:
    """On the meta device there is none: whoever asks for one gets an error."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to("meta")
    rules = [fxreg.Rule(fxreg.l1(0.1)), fxreg.Rule(fxreg.l2(0.1), via="gradient"), fxreg.Rule(fxreg.clip_norm(1.0))]
    gm = fxreg.transform(model, rules)
    optimizer = make(model.parameters(), lr=0.1)
    step = fxreg.train_step(gm, lambda output: output.square().mean(), optimizer, backend="aot_eager")
    for _ in range(3):
        assert step(torch.empty(5, 4, device="meta")).is_meta
    steps = {float(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert steps == ({3.0} if make is not SGD else set())


@on_each_device
def test_penalties_on_activations_are_where_the_model_is(device: torch.device) -> None:
    model, inputs = build("opaque")
    rule = fxreg.Rule(fxreg.l2(0.1), layer="Linear", on="output", label="activity")
    expected = fxreg.penalties(fxreg.transform(copy.deepcopy(model).double(), rule), inputs[0].double())["activity"]
    gm = fxreg.transform(model.to(device), rule)
    value = fxreg.penalties(gm, inputs[0].to(device))["activity"]
    assert value.device.type == device.type
    torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("has_own", [False, True])
def test_recurrent_layers_move_no_weights_into_new_memory_while_others_stand_in(
    has_own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU they would; on the CPU a layer that is asked to looks, and leaves it."""
    asked: list[nn.Module] = []
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda layer: asked.append(layer))
    model, (x,) = build("lstm")
    if has_own:
        model.lstm.flatten_parameters = lambda: asked.append(model)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.clip_norm(0.1)))
    asked.clear()
    before = {**vars(model.lstm)}
    gm(x).sum().backward()
    assert not asked
    assert vars(model.lstm) == before
