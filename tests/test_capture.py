"""Capture is faithful or refuses: on every adversarial model the emitted module is the model plus its penalty.

The reference is the original model, built a second time from the same seed, with the penalty written by hand: neither
fxreg's graph nor its `verify` has a part in it.
"""

import collections
import contextlib
import copy
import dataclasses
import enum
import functools
import itertools
import math
import random
import re
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.mutation_guard import install_generation_tagging_init
from torch.nn import functional as F
from torch.overrides import _len_torch_function_stack  # private: no public way to ask

import fxreg

from .adversarial import CASES, Block, Branching, Case, Net
from .marks import slow_but, some

pytestmark = [
    # Of the old normalizations and of scripting, and of Dynamo looking at its inputs after a graph break.
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

install_generation_tagging_init()  # into nn.Module, as Dynamo does at its first use: no trace of a capture

STRENGTH = 0.01
L1 = fxreg.Rule(fxreg.l1(STRENGTH))
HALF = fxreg.Rule(fxreg.scale(0.5))


class Nested(nn.Module):
    """An adversarial model inside an innocent one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(3, 3), inner, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(self.inner(self.before(x))))


def nested(case: Case) -> Case:
    return dataclasses.replace(
        case,
        make=lambda: Nested(case.make()),
        state=lambda model: case.state(model.inner),
        later=lambda model: case.later(model.inner),
    )


TABLE = {
    **CASES,
    **{f"{name}-nested": nested(case) for name, case in CASES.items() if case.nests},
}

COMPILING = ("CompiledChild", "compiled_root")
"""Models that call the compiler themselves; the quickest of their kind, CompiledFunction, is among the quick tests."""


def _each(names: Iterable[str], quick: int = 1) -> pytest.MarkDecorator:
    """Of these names each; one of so many is quick, unless it compiles."""
    names = [*names]
    return pytest.mark.parametrize("name", slow_but([n for n in names[::quick] if not n.startswith(COMPILING)], names))


every_case = _each(TABLE, quick=2)
every_stateful = _each((*CASES, *some([n for n, c in TABLE.items() if n not in CASES and c.remembers], 3)), quick=3)
every_hiding = _each((*CASES, *some([n for n, c in TABLE.items() if n not in CASES and c.hides], 3)), quick=3)
every_model = _each(CASES)


def build(case: Case) -> nn.Module:
    case.reset()
    torch.manual_seed(0)
    return case.make()


@dataclasses.dataclass
class Step:
    """What one call showed.

    Attributes:
        where: which call it was.
        output: what it returned, or the error it raised.
        inputs: its arguments after the call.
        gradients: of every parameter.
        buffers: after the call.
        state: the Python state after the call.
    """

    where: str
    output: Any
    inputs: Any
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    state: Any


def seed() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def observe(
    case: Case,
    called: nn.Module,
    model: nn.Module,
    loss_of: Callable[[Any], Tensor | None],
    stop: Any = (),
    most: int = 99,
) -> list[Step]:
    """Make the case's calls in train mode, in eval mode and without gradients, the former with a backward pass each.
    Ends early at an error of the kind `stop`."""
    steps = []
    torch.manual_seed(7)
    calls = case.inputs()
    planned = [("train", calls[:most]), ("eval", calls[: min(most, 2)]), ("no_grad", calls[: most - 1][:1])]
    for mode, number, call in ((mode, *pair) for mode, made in planned for pair in enumerate(made)):
        args, kwargs = ((), call) if isinstance(call, dict) else (call, {})
        args, kwargs = fresh((args, kwargs))
        called.train(mode == "train")
        for parameter in model.parameters():
            parameter.grad = None
        seed()
        where = f"call {number}, {mode}"
        try:
            with torch.set_grad_enabled(mode != "no_grad"):
                output = called(*args, **kwargs)
            loss = None if mode == "no_grad" else loss_of(output)
            if loss is not None and loss.requires_grad:
                loss.backward()
        except stop:
            break
        except Exception as error:
            output = error
        steps.append(
            Step(
                where,
                kept(output, with_grad=mode != "no_grad"),
                kept((args, kwargs)),
                {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
                {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
                case.state(model),
            )
        )
    return steps


def fresh(value: Any) -> Any:
    """The arguments of a call, copied but for what they share."""
    return copy.deepcopy(value)


def kept(value: Any, with_grad: bool = True) -> Any:
    """An output as it is now, whatever is done in place later."""
    match value:
        case Tensor():
            return value.detach().clone().requires_grad_(value.requires_grad and with_grad)
        case dict():
            return (type(value), {key: kept(one, with_grad) for key, one in value.items()})
        case list() | tuple():
            return (type(value), [kept(one, with_grad) for one in value])
        case _ if dataclasses.is_dataclass(value):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return (type(value), kept(fields, with_grad))
        case Exception():
            return type(value)
    return value if isinstance(value, bool | int | float | str | slice | set | None) else type(value)


def tensors(value: Any) -> Iterable[Tensor]:
    match value:
        case Tensor():
            yield value
        case dict():
            yield from (t for one in value.values() for t in tensors(one))
        case list() | tuple():
            yield from (t for one in value for t in tensors(one))
        case _ if dataclasses.is_dataclass(value):
            yield from (t for field in dataclasses.fields(value) for t in tensors(getattr(value, field.name)))


def probe(output: Any) -> Tensor | None:
    """A scalar that looks at every element of every differentiable output, differently."""
    total = None
    for k, tensor in enumerate(tensors(output)):
        if tensor.requires_grad:
            index = torch.arange(1, tensor.numel() + 1, dtype=torch.float32)
            term = (tensor.reshape(-1) * torch.cos(index + k)).sum()
            total = term if total is None else total + term
    return total


@functools.cache
def expected(name: str, penalty: float = STRENGTH, factor: float = 1.0) -> list[Step]:
    """The calls on the original model, with loss and penalty written by hand."""
    case = TABLE[name]
    model = build(case)
    case.later(model)

    def loss_of(output: Any) -> Tensor | None:
        loss = probe(output)
        if loss is None or not penalty:
            return loss
        return loss + penalty * sum(p.abs().sum() for p in model.parameters() if p.requires_grad)

    steps = observe(case, model, model, loss_of)
    for step in steps:
        step.gradients = {name: None if g is None else factor * g for name, g in step.gradients.items()}
    return steps


def emitted(case: Case, rule: fxreg.Rule, with_examples: bool = False) -> tuple[nn.Module, nn.Module]:
    """The model and what became of it."""
    model = build(case)
    torch.manual_seed(7)
    examples = fresh(case.inputs()[0]) if with_examples else None
    gm = fxreg.transform(model, [rule], example_inputs=examples)
    return model, gm


def assert_equals(actual: list[Step], wanted: list[Step], refusal: str) -> None:
    if len(actual) < len(wanted):
        assert refusal, f"refused at {wanted[len(actual)].where}, although the model can do it"
    for ours, theirs in zip(actual, wanted, strict=False):
        where = theirs.where
        assert same(ours.output, theirs.output), f"{where}: {ours.output} instead of {theirs.output}"
        assert same(ours.inputs, theirs.inputs), f"{where}: leaves other arguments behind"
        assert same(ours.state, theirs.state), f"{where}: leaves {ours.state} instead of {theirs.state}"
        assert same(ours.buffers, theirs.buffers), f"{where}: leaves other buffers"
        assert ours.gradients.keys() == theirs.gradients.keys()
        for name, gradient in theirs.gradients.items():
            found = ours.gradients[name]
            if gradient is None or found is None:
                assert gradient is found or not (gradient if found is None else found).any(), f"{where}: {name}.grad"
                continue
            error = float((found.double() - gradient.double()).norm() / gradient.double().norm().clamp_min(1e-9))
            assert error < 1e-5, f"{where}: gradient of {name} is off by a factor of {error:.2g}"


def same(one: Any, other: Any) -> bool:
    """Equality, bitwise and in every type."""
    if type(one) is not type(other):
        return False
    match one:
        case Tensor():
            alike = one.dtype == other.dtype and one.shape == other.shape and one.requires_grad == other.requires_grad
            return alike and bool(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True).all())
        case dict():
            return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
        case list() | tuple():
            return len(one) == len(other) and all(map(same, one, other))
        case float():
            return one == other or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


# The table.


@every_case
def test_is_the_model_plus_its_penalty(name: str) -> None:
    case = TABLE[name]
    try:
        model, gm = emitted(case, L1)
    except fxreg.FxregError as error:
        if case.refusal:
            return
        raise AssertionError(f"refused: {error}") from error
    assert_trains(name, model, gm)


@every_model
@pytest.mark.slow
def test_verified_it_is_the_model_plus_its_penalty_and_leaves_no_trace(name: str) -> None:
    """In the model, the examples and the random numbers; state kept outside the model is the model's own affair."""
    case = TABLE[name]
    model = build(case)
    torch.manual_seed(7)
    examples = fresh(case.inputs()[0])
    given = kept(examples)
    seed()
    before, gm = fingerprint(model, versions=False), None
    try:
        gm = fxreg.transform(model, [L1], example_inputs=examples)
    except fxreg.FxregError as error:
        if not (case.refusal or case.unverifiable):
            raise AssertionError(f"refused: {error}") from error
    assert same(kept(examples), given)
    assert changed(before, fingerprint(model, versions=False)) == []
    if gm is not None:
        assert_trains(name, model, gm)


def assert_trains(name: str, model: nn.Module, gm: nn.Module) -> None:
    """On the model's loss plus the penalty."""
    case = TABLE[name]
    case.reset()
    case.later(model)
    assert_equals(observe(case, gm, model, probe, fxreg.FxregError), expected(name), case.refusal)


@every_hiding
def test_a_gradient_transform_holds_or_is_refused(name: str) -> None:
    case = TABLE[name]
    allowed = case.refusal or case.hides
    try:
        model, gm = emitted(case, HALF)
    except fxreg.FxregError as error:
        if allowed:
            return
        raise AssertionError(f"refused: {error}") from error
    case.reset()
    case.later(model)
    assert_equals(observe(case, gm, model, probe, fxreg.FxregError), expected(name, 0.0, 0.5), allowed)


class BoundParameter(nn.Module):
    """Keeps a method of a parameter's, which is written in C: Dynamo fails on it, so this is in no table."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.w = nn.Linear(3, 3), nn.Parameter(torch.ones(3))
        self.scale = self.w.mul

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.fc(x)) if x.sum() < 1e9 else x


@pytest.mark.parametrize("examples", [None, (torch.ones(2, 3),)])
def test_a_parameters_method_is_a_way_past_its_name(examples: Any) -> None:
    model = BoundParameter()
    with pytest.raises(fxreg.CaptureError, match="'w', but that parameter is also held in the attribute 'scale'"):
        fxreg.transform(model, fxreg.Rule(fxreg.clip_value(0.01)), example_inputs=examples)
    fxreg.transform(model, fxreg.Rule(fxreg.l1(0.1)), example_inputs=examples)(torch.ones(2, 3)).sum().backward()
    reference = BoundParameter()
    reference.load_state_dict(model.state_dict())
    (reference(torch.ones(2, 3)).sum() + 0.1 * sum(p.abs().sum() for p in reference.parameters())).backward()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("name", ["SavedTensorsByHand", "DispatchModeOnStack", "DefaultDtype"])
@pytest.mark.parametrize("examples", [False, True], ids=["", "verified"])
def test_what_a_trace_breaks_off_in_the_middle_of_is_put_back(name: str, examples: bool) -> None:
    _, gm = emitted(CASES[name], L1, examples)
    assert fxreg.explain(gm).opaque
    assert torch.get_default_dtype() == torch.float32
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert torch._C._len_torch_dispatch_stack() == _len_torch_function_stack() == 0


@every_stateful
def test_capture_leaves_no_trace(name: str) -> None:
    """Neither in anything that can be looked at, nor in what the model does afterwards."""
    case = TABLE[name]
    model = build(case)
    seed()
    before, state = fingerprint(model), case.state(model)
    try:
        fxreg.transform(model, [L1])
    except fxreg.FxregError:
        assert case.refusal
    assert case.state(model) == state
    assert changed(before, fingerprint(model)) == []
    case.later(model)
    assert_equals(observe(case, model, model, probe), expected(name, 0.0), "")


@every_model
@pytest.mark.slow
def test_plain_tracing_is_wrong_or_refuses(name: str) -> None:
    """Keeps the table honest."""
    case = TABLE[name]
    model = build(case)
    before = fingerprint(model)
    try:
        traced = fx.symbolic_trace(model)
    except BaseException:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        return
    if changed(before, fingerprint(model)):
        return
    case.reset()
    case.later(model)
    with pytest.raises(AssertionError):
        assert_equals(observe(case, traced, model, probe), expected(name, 0.0), "")


@pytest.mark.slow
@pytest.mark.parametrize("name", some([name for name in CASES if name not in ("scripted_root", "compiled_root")]))
def test_compiled_it_trains_as_the_compiled_model(name: str) -> None:
    case = CASES[name]
    model = build(case)
    case.later(model)

    def loss_of(output: Any) -> Tensor | None:
        loss = probe(output)
        if loss is None:
            return None
        return loss + STRENGTH * sum(p.abs().sum() for p in model.parameters() if p.requires_grad)

    wanted = observe(case, torch.compile(model, backend="eager"), model, loss_of, most=1)
    try:
        model, gm = emitted(case, L1, with_examples=True)
    except fxreg.FxregError:
        assert case.refusal or case.unverifiable
        return
    torch.compiler.reset()
    case.reset()
    case.later(model)
    compiled = torch.compile(gm, backend="eager")
    assert_equals(observe(case, compiled, model, probe, fxreg.FxregError, most=1), wanted, case.refusal)


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints."""
    return [key for key in {**before, **after} if before.get(key) != after.get(key)]


def fingerprint(model: nn.Module, versions: bool = True) -> dict[str, Any]:
    """Everything that a capture could change: the model's state, the random numbers, and what the process shares."""
    found: dict[str, Any] = {
        "class nn.Module": {key: id(value) for key, value in vars(nn.Module).items() if callable(value)},
        "functions of torch": [id(f) for f in (torch.is_grad_enabled, torch.is_autocast_enabled, torch.rand)],
        "functions of the compiler": [id(f) for f in (torch.compiler.is_compiling, torch._utils.is_compiling)],
        "functions of autograd": {
            k: id(v) for k, v in vars(torch.autograd.function).items() if k != "__warningregistry__"
        },
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch._C._is_any_autocast_enabled()),
        "function modes": _len_torch_function_stack(),
        "random": random.getstate(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
    }
    seen: set[int] = set()
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            found[f"{path}.{key}"] = print_of(value, seen, versions)
    return found


def print_of(value: Any, seen: set[int], versions: bool) -> Any:
    """What a value is now, in a form that compares."""
    if isinstance(value, Tensor):
        mark = value._version if versions else value.detach().tolist()
        return (id(value), mark, value.requires_grad, id(value.grad) if value.is_leaf else None)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, itertools.cycle):
        return repr(value.__reduce__()) if sys.version_info < (3, 14) else None
    inert = isinstance(value, nn.Module | type) or type(value).__module__.startswith("torch._dynamo")
    if inert or (callable(value) and not hasattr(value, "__dict__")):
        return id(value)
    if id(value) in seen:
        return id(value)
    if isinstance(value, dict):
        seen.add(id(value))
        return (type(value), id(value), [(key, print_of(one, seen, versions)) for key, one in value.items()])
    if isinstance(value, list | tuple | set):
        seen.add(id(value))
        return (type(value), [print_of(one, seen, versions) for one in value])
    if hasattr(value, "__dict__"):
        seen.add(id(value))
        return (id(value), print_of(vars(value), seen, versions))
    return repr(value)


# What is not in the table: depth, reasons, failures half-way, and other threads.


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        y += x
        return torch.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.stages = nn.Sequential(*(nn.Sequential(Residual(4), Residual(4)) for _ in range(2)))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.head(F.dropout(x, 0.2, self.training))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, d))
        return x + self.mlp(x)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (ResNet, (2, 1, 6, 6)),
        (Encoder, (2, 5, 8)),
        (lambda: nn.Sequential(Encoder(), Encoder(), nn.Linear(8, 2)), (2, 5, 8)),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), (2, 3, 4)),
    ],
    ids=["resnet", "encoder", "encoders", "mlp"],
)
def test_plain_models_are_captured_to_the_layers(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = make()
    gm = fxreg.transform(model, [L1], example_inputs=(torch.randn(shape),))
    assert fxreg.explain(gm).opaque == {}
    called = {node.target for node in gm.graph.nodes if node.op == "call_module"}
    layers = {name for name, module in model.named_modules() if not [*module.children()]}
    assert called == layers


def test_the_smallest_enclosing_module_stays_whole_and_says_why() -> None:
    model = nn.Sequential(Block(), nn.Sequential(Block(), Branching()), nn.Linear(3, 3))
    report = fxreg.explain(fxreg.transform(model, [L1]))
    assert list(report.opaque) == ["1.1"]
    assert "opaque: 1.1: " in str(report)
    assert "value" in report.opaque["1.1"]


REASONS = {
    "TrainingBranch": "value|training|branch",
    "NoGrad": "grad|context",
    "Autocast": "autocast|context",
    "Reversal": "autograd.Function",
    "root_hook": "hooks",
    "PythonFactor": "random",
    "Counter": "attribute|Counter.n",
    "Log": "log|append",
    "Rebound": "attribute|Rebound.buf",
    "PlainList": "registered",
    "replaced_forward": "forward",
    "OverriddenRoot": "__call__",
    "RowLoop": "iterates|loop",
    "SizeLoop": "value|loop|size",
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_names_what_the_forward_did(name: str) -> None:
    report = fxreg.explain(emitted(CASES[name], L1)[1])
    assert re.search(REASONS[name], " ".join(report.opaque.values()))


@pytest.mark.slow
def test_the_innocent_rest_of_a_model_is_captured() -> None:
    """Around each model that maps a batch to a batch, the layers before and after it are nodes, or it says why not."""
    shallow = []
    for name, case in TABLE.items():
        if name.endswith("-nested"):
            try:
                report = fxreg.explain(emitted(case, L1)[1])
            except fxreg.FxregError:
                continue
            if "" in report.opaque:
                shallow.append(name.removesuffix("-nested"))
    assert len(shallow) < sum(case.nests for case in CASES.values()) / 4, shallow


def interrupted(x: Tensor) -> Tensor:
    random.random()
    torch._C._set_grad_enabled(False)
    raise KeyboardInterrupt


def test_an_interrupt_half_way_leaves_no_trace() -> None:
    class Interrupted(Net):
        def forward(self, x: Tensor) -> Tensor:
            return interrupted(self.fc(x)) * self.w

    model = nn.Sequential(Block(), Interrupted())
    before = fingerprint(model)
    with contextlib.suppress(KeyboardInterrupt):  # nothing is raised where the forward was never tried
        fxreg.transform(model, [L1])
    assert changed(before, fingerprint(model)) == []


def test_a_lazy_model_is_refused() -> None:
    with pytest.raises(fxreg.FxregError, match=r"(?i)lazy"):
        fxreg.transform(nn.Sequential(nn.LazyLinear(3)), [L1])


def test_a_model_on_the_meta_device_is_captured() -> None:
    with torch.device("meta"):
        model = ResNet()
    gm = fxreg.transform(model, [L1, HALF])
    assert gm(torch.empty(2, 1, 6, 6, device="meta")).shape == (2, 3)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_the_mode_around_transform_is_not_captured(context: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Linear(3, 3))
    code = fxreg.transform(model, [L1]).code
    with context():
        gm = fxreg.transform(model, [L1])
    assert gm.code == code
    gm(torch.ones(2, 3)).sum().backward()


def test_other_threads_do_not_notice() -> None:
    """Forward passes, training modes, new modules and scripted ones, while other models are captured."""
    model = nn.Sequential(Block(), nn.Dropout(0.5), Branching())
    twin = copy.deepcopy(model).eval()
    scripted = torch.jit.script(Branching())
    x = torch.ones(2, 3)
    errors: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            while not done.is_set():
                for training in (True, False):
                    model.train(training)
                    scripted.train(training)
                    assert model.training is training
                    assert scripted.training is training
                    assert type(model(x)) is Tensor
                    assert type(scripted(x)) is Tensor
                assert torch.equal(model(x), twin(x))
                assert nn.Dropout(0.5).eval().training is False
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for name in ("TrainingArgument", "Counter", "Reversal", "PythonInChild", "Pythonic") * 4:
            fxreg.transform(CASES[name].make(), [L1])
    finally:
        done.set()
        thread.join()
    assert errors == []


def test_one_capture_does_not_disturb_another_in_a_second_thread() -> None:
    codes: dict[int, set[str]] = {0: set(), 1: set()}
    models = [ResNet(), Encoder()]

    def work(k: int) -> None:
        for _ in range(5):
            codes[k].add(fxreg.transform(models[k], [L1]).code)

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {k: {fxreg.transform(models[k], [L1]).code} for k in (0, 1)}


def _closing_over(value: Any) -> Callable[[], Any]:
    return lambda: value


def _defaulting_to(value: Any) -> Callable[[], Any]:
    def read(*, kept: Any = value) -> Any:
        return kept

    return read


class _InSlot:
    __slots__ = ("kept",)

    def __init__(self, value: Any) -> None:
        self.kept = value


@pytest.mark.parametrize("hide", [lambda w: collections.deque([w]), _closing_over, _defaulting_to, _InSlot])
def test_a_transformed_parameter_that_is_also_held_elsewhere_is_refused(hide: Callable[[nn.Parameter], Any]) -> None:
    model = nn.Linear(3, 2)
    model.hidden = hide(model.weight)
    with pytest.raises(fxreg.CaptureError, match="'hidden'"):
        fxreg.transform(model, fxreg.Rule(fxreg.scale(0.5), param="weight"))


def test_an_unfilled_closure_in_a_formula_or_an_output_is_no_obstacle() -> None:
    def late() -> tuple[Callable[[Tensor], Tensor], Callable[[], Any]]:
        def formula_with_late_name(weight: Tensor) -> Tensor:
            return weight.abs().sum() if weight.ndim else weight * unfilled

        def in_output() -> Any:
            return unfilled

        if not late:
            unfilled = 1
        return formula_with_late_name, in_output

    formula, function = late()
    effect = fxreg.penalty(formula)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Any:
            return self.inner(x), function

    output, kept = fxreg.transform(Pair(), fxreg.Rule(effect(0.1)))(torch.ones(1, 2))
    assert output.requires_grad
    assert kept is function


class _Appending(nn.Module):
    def __init__(self, log: list[int], appends: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.log, self.appends = log, appends

    def forward(self, x: Tensor) -> Tensor:
        if self.appends:
            self.log.append(1)
        return self.linear(x)


def test_of_modules_that_share_a_list_only_the_one_that_changes_it_stays_whole() -> None:
    log: list[int] = []
    gm = fxreg.transform(nn.Sequential(*(_Appending(log, appends=i == 1) for i in range(3))), L1)
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["0.linear", "1", "2.linear"]
    assert log == []


class _Asking(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.parents = [parent]

    def forward(self, x: Tensor) -> Tensor:
        flags: Any = self.parents[0].flags
        return self.linear(x) * (2.0 if flags["on"] and bool((x > -1e9).all()) else 1.0)


class _Switching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flags = {"on": False}
        self.child = _Asking(self)

    def forward(self, x: Tensor) -> Tensor:
        self.flags["on"] = True
        y = self.child(x)
        self.flags["on"] = False
        return y


def test_a_change_that_a_whole_module_sees_through_a_reference_to_its_parent_is_noticed() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(_Switching(), nn.Linear(3, 1)), torch.randn(2, 3)
    expected = model(x)
    assert torch.equal(fxreg.transform(model, L1)(x), expected)


class Scale(enum.Enum):
    ONE = 1.0
    TWO = 2.0


class _Defaults(nn.Module):
    """Has defaults that a graph's code cannot say, and a required argument after them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, scale: Scale = Scale.ONE, sizes: Any = [1], *, mask: Tensor) -> Tensor:  # noqa: B006
        return self.linear(x) * scale.value * len(sizes) * mask


ROW = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("examples", "left_out"),
    [
        ({"x": ROW, "scale": Scale.TWO, "mask": ROW}, "scale"),
        ({"x": ROW, "sizes": [1, 2], "mask": ROW}, "sizes"),
        ({"x": ROW, "mask": ROW}, "mask"),
    ],
)
def test_an_argument_whose_default_no_code_can_say_must_be_passed(examples: dict[str, Any], left_out: str) -> None:
    model = _Defaults()
    gm = fxreg.transform(model, L1, example_inputs=examples)
    torch.testing.assert_close(gm(**examples), model(**examples), rtol=0, atol=0)
    with pytest.raises(fxreg.CaptureError, match=f"{left_out!r} was left out"):
        gm(**{name: value for name, value in examples.items() if name != left_out})


def counting(forward: Any) -> Any:
    """A decorator that sees how it is called."""

    @functools.wraps(forward)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs) * (1 + len(args) + 10 * len(kwargs))

    return counted


class _Decorated(nn.Linear):
    @counting
    def forward(self, x: Tensor, y: Any = None) -> Any:
        return super().forward(x) + (0.0 if y is None else y)


@pytest.mark.parametrize(
    ("args", "kwargs"), [((ROW,), {}), ((), {"x": ROW}), ((ROW, ROW), {}), ((), {"x": ROW, "y": ROW})]
)
def test_the_forward_is_called_as_the_examples_say(args: Any, kwargs: Any) -> None:
    model = _Decorated(3, 3)
    gm = fxreg.transform(model, L1, example_inputs=args or kwargs)
    torch.testing.assert_close(gm(*args, **kwargs), model(*args, **kwargs), rtol=0, atol=0)


class _Rest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, *rest: Tensor, scale: float = 1.0) -> Tensor:
        return sum(rest, self.linear(x)) * scale


class _OddRest(_Rest):
    def forward(self, x: Tensor, *rest: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x, *rest, scale=scale) * (2 if type(rest) is list else 1)


@pytest.mark.parametrize("make", [_Rest, _OddRest])
@pytest.mark.parametrize("count", [1, 2])
def test_more_arguments_than_the_examples_are_no_keyword_ones(make: Any, count: int) -> None:
    model = make()
    gm = fxreg.transform(model, L1, example_inputs=(ROW,) * count)
    assert torch.equal(gm(*(ROW,) * count), model(*(ROW,) * count))
    with pytest.raises(fxreg.CaptureError, match=r"'\*rest' was fixed"):
        gm(*(ROW,) * (count + 1))


class _InOrder(_Rest):
    def forward(self, **inputs: Tensor) -> Any:
        return sum(self.linear(value) * number for number, value in enumerate(inputs.values()))


@pytest.mark.parametrize("names", ["a", "ab"])
def test_keyword_arguments_come_in_any_order(names: str) -> None:
    model = _InOrder()
    gm = fxreg.transform(model, L1, example_inputs=dict.fromkeys(names, ROW))
    for order in itertools.permutations(names):
        call = {name: ROW * number for number, name in enumerate(order, start=1)}
        assert torch.equal(gm(**call), model(**call))


@pytest.mark.parametrize("via", ["penalty", "gradient"])
def test_a_graph_that_switches_gradients_off_around_a_first_use_trains_by_the_later_one(via: Any) -> None:
    root, graph = nn.ModuleDict({"linear": nn.Linear(4, 4)}), fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch._C._set_grad_enabled, (False,))
    held = graph.call_module("linear", (x,))
    graph.call_function(torch._C._set_grad_enabled, (True,))
    graph.output(graph.call_function(torch.mul, (held, graph.call_module("linear", (x,)))))
    model = fx.GraphModule(root, graph)
    inputs = torch.randn(3, 4)
    weight = model.linear.weight
    (expected,) = torch.autograd.grad(model(inputs).sum() + 0.3 * weight.abs().sum(), weight)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.3), param="weight", via=via), example_inputs=(inputs,))
    (found,) = torch.autograd.grad(gm(inputs).sum(), weight)
    torch.testing.assert_close(found, expected)


class _Yielding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        for _ in range(2):
            x = self.linear(x)
            yield x


@pytest.mark.parametrize(
    "rule", [fxreg.Rule(fxreg.scale(0.5)), fxreg.Rule(fxreg.l2(1.0), layer=nn.Linear, on="output")]
)
def test_what_runs_after_the_call_is_refused_where_a_rule_would_not_act_there(rule: fxreg.Rule) -> None:
    gm = fxreg.transform(_Yielding(), rule, emit="output")
    with pytest.raises(fxreg.CaptureError, match=r"returns a generator, which runs after the call.*in a list"):
        gm(torch.ones(2, 3))


class _Whole(nn.Module):
    """Runs as it is, and so on stand-ins where a rule transforms gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.linear.weight.gain = 3.0  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        y = self.run(x)
        return y if y.sum() > -1e9 else y * 2

    def run(self, x: Tensor) -> Tensor:
        raise NotImplementedError  # abstract: each kind below has its own


class _AsksForAttribute(_Whole):
    def run(self, x: Tensor) -> Tensor:
        return self.linear(x) * getattr(self.linear.weight, "gain", 1.0)


class _AsksForGradient(_Whole):
    def run(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2.0 if self.linear.weight.grad is None else 1.0)


class _AsksForParameter(_Whole):
    def run(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2.0 if isinstance(self.linear.weight, nn.Parameter) else 1.0)


class _AsksForLeaf(_Whole):
    def run(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2.0 if self.linear.weight.is_leaf else 1.0)


class _Replaces(_Whole):
    def run(self, x: Tensor) -> Tensor:
        self.linear.weight = nn.Parameter(self.linear.weight.detach() * 2)
        return self.linear(x)


class _SetsData(_Whole):
    def run(self, x: Tensor) -> Tensor:
        self.linear.weight.data = self.linear.weight.data * 2
        return self.linear(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("kind", [_AsksForAttribute, _AsksForGradient])
def test_stand_ins_look_like_the_parameters(kind: type[nn.Module]) -> None:
    model = kind()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.scale(0.5), param="weight"))
    x = torch.randn(2, 3)
    for _ in range(2):
        y = gm(x)
        assert torch.equal(y, model(x))
        y.sum().backward()


@pytest.mark.parametrize("kind", [_AsksForParameter, _AsksForLeaf, _Replaces])
def test_who_asks_whether_it_is_a_parameter_gets_no_stand_in(kind: type[nn.Module]) -> None:
    with pytest.raises(fxreg.CaptureError, match=r"asks whether a tensor is a parameter.*exclude="):
        fxreg.transform(kind(), fxreg.Rule(fxreg.scale(0.5), param="weight"))
    fxreg.transform(kind(), L1)


def test_data_that_is_set_would_be_lost_on_a_stand_in() -> None:
    gm = fxreg.transform(_SetsData(), fxreg.Rule(fxreg.scale(0.5), param="weight"))
    with pytest.raises(fxreg.CaptureError, match="would be lost on a stand-in"):
        gm(torch.ones(2, 3))


class _Tying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.other.weight = self.one.weight
        return self.other(self.one(x))


def test_examples_for_a_forward_that_ties_parameters_are_an_error_in_words() -> None:
    with pytest.raises(fxreg.VerifyError, match=r"ties parameters.*Call the model once"):
        fxreg.transform(_Tying(), L1, example_inputs=(torch.ones(2, 3),))
