"""Under torch.compile: Inductor's gradients, graph breaks, compilations, and where nothing may be computed."""

import copy
import itertools
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxreg

from .marks import in_turn, slow_but
from .models import CASES, MLP, build
from .reference import assert_same, by_hand, objective, twin
from .test_contexts import EMITS, LOWERINGS, Cell, _compiles_whole, gradients_of, loss_of, terms_of

pytestmark = pytest.mark.filterwarnings(  # Dynamo's own, looking at its inputs after a graph break
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


def _inductor_cells() -> list[tuple[str, str, str]]:
    """Every model with every emit and every lowering at least once, and every pair of emit and lowering: 18 cells."""
    names = list(CASES)
    return [
        (names[(k + shift) % len(names)], emit, LOWERINGS[(k + shift) % len(LOWERINGS)])
        for k, emit in enumerate(EMITS)
        for shift in range(len(names))
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "emit", "lowering"), _inductor_cells())
def test_inductor_gives_the_hand_written_gradients(model: str, emit: str, lowering: str) -> None:
    torch._dynamo.reset()
    cell = Cell(model, emit, lowering)
    if model == "cnn":  # Inductor draws its own dropout masks
        cell.gm.eval()
        cell.original.eval()
        if emit == "loss":
            cell.terms = [term for term in cell.terms if term.penalty is None or term.via == "gradient"]
    compiled = torch.compile(cell.gm, fullgraph=_compiles_whole(cell))
    assert_same(cell.actual(module=compiled), cell.expected(), 1e-4)


class Counting:
    """A backend that counts compilations and runs the graph as it is."""

    def __init__(self) -> None:
        self.compilations = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.compilations += 1
        return graph.forward


@pytest.mark.parametrize("emit", EMITS)
@pytest.mark.parametrize("via", ["penalty", "gradient"])
def test_a_new_strength_acts_at_the_next_step_without_recompiling(emit: str, via: str) -> None:
    torch._dynamo.reset()
    model, inputs = MLP(), (torch.randn(4, 6),)
    wrapped: nn.Module = model
    if emit == "loss":
        from .test_contexts import WithLoss

        wrapped = WithLoss(model)
    gm = fxreg.transform(wrapped, [fxreg.Rule(fxreg.l1(0.1), via=via, label="sparse")], emit=emit)
    backend = Counting()
    step = torch.compile(gm, backend=backend)
    plain = gradients_of(wrapped, loss_of(twin(gm)(*inputs), emit)) and by_hand(
        wrapped, wrapped(*inputs)["loss"] if emit == "loss" else objective(wrapped(*inputs)), []
    )
    for k, strength in enumerate((0.1, 0.2, 0.05, 0.0, 1.0)):
        if k % 2:
            fxreg.strengths(gm)["sparse"] = strength
        else:
            fxreg.strengths(gm)["sparse"].fill_(strength)
        actual = gradients_of(wrapped, loss_of(step(*inputs), emit))
        for (name, parameter), got in zip(wrapped.named_parameters(), actual.values(), strict=True):
            base = plain[name]
            if base is None:
                reached = torch.zeros_like(parameter) if via == "penalty" else None
                expected = None if reached is None else strength * parameter.sign()
            else:
                expected = base + strength * parameter.sign()
            assert (expected is None) == (got is None)
            if expected is not None:
                torch.testing.assert_close(got, expected)
    assert backend.compilations == 1


@pytest.mark.slow
@pytest.mark.parametrize(("model", "emit"), in_turn([*itertools.product(CASES, EMITS)]))
def test_no_graph_break_that_the_model_alone_does_not_have(model: str, emit: str) -> None:
    cell = Cell(model, emit, "mixed")
    breaks = []
    for module in (cell.original, cell.gm):
        torch._dynamo.reset()
        breaks.append(len(torch._dynamo.explain(module)(*cell.inputs).break_reasons))
    torch._dynamo.reset()
    assert breaks[1] <= breaks[0]


class Ops(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("is_pickled", slow_but([True], [False, True]))
@pytest.mark.parametrize("rule", [fxreg.Rule(fxreg.l1(0.1)), fxreg.Rule(fxreg.l1(0.1), via="proximal")])
def test_a_process_compiles_more_modules_than_one_function_may_be_compiled_for(
    rule: fxreg.Rule, is_pickled: bool
) -> None:
    torch._dynamo.reset()
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        gm = fxreg.transform(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), rule)
        gm = pickle.loads(pickle.dumps(gm)) if is_pickled else gm
        torch.compile(gm, backend="eager", fullgraph=True)(torch.ones(2, 3)).sum().backward()


@pytest.mark.parametrize("via", ["penalty", "gradient"])
def test_under_no_grad_nothing_of_a_penalty_is_computed(via: str) -> None:
    model, (x,) = build("mlp")
    gm = fxreg.transform(model, [fxreg.Rule(fxreg.l1(0.1), via=via), fxreg.Rule(fxreg.l2(0.1), via=via)])
    with torch.no_grad(), Ops() as plain:
        model(x)
    with torch.no_grad(), Ops() as regularized:
        gm(x)
    work = regularized.seen - plain.seen
    assert not {op for op in work if "sum" in op or "abs" in op or "mul" in op or "pow" in op or "sign" in op}


def test_the_forward_pass_reads_no_weight_for_a_penalty_whose_value_nobody_asked_for() -> None:
    model, (x,) = build("mlp")
    gm = fxreg.transform(model, [fxreg.Rule(effect) for effect in (fxreg.l1(0.1), fxreg.l2(0.1))])
    with Ops() as plain:
        model(x)
    with Ops() as regularized:
        gm(x)
    work = regularized.seen - plain.seen
    assert not {op for op in work if "sum" in op or "abs" in op or "mul" in op or "pow" in op}


class Odd(nn.Module):
    """A weight used twice, one the loss does not reach, one that a buffer's update depends on, a view, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused, self.frozen = (nn.Linear(5, 5) for _ in range(4))
        self.frozen.requires_grad_(False)
        self.register_buffer("last", torch.zeros(5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.b(self.a(self.frozen(x)).tanh())
        with torch.no_grad():
            self.last.copy_(self.unused(y)[0])
        return self.a(y) + x @ self.b.weight.t()[:, :5], self.unused(x.detach()).detach()


ODD_RULES = [
    fxreg.Rule(fxreg.l1(0.1), param="weight"),
    fxreg.Rule(fxreg.l2(0.2), exclude="frozen.*"),
    fxreg.Rule(fxreg.group_lasso(0.3), name="b", param="weight"),
    fxreg.Rule(fxreg.clip_norm(0.5), name="a", param="weight"),
]


def odd_penalty(model: nn.Module) -> Tensor:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    l1 = sum(p.abs().sum() for n, p in named.items() if n.endswith("weight"))
    groups = named["b.weight"].norm(dim=1).sum()
    return 0.1 * l1 + 0.2 * sum(p.square().sum() for p in named.values()) + 0.3 * groups


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("calls", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("clips", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_hooks_of_a_compilation_give_every_weight_its_penalty_once(backend: str, calls: int, clips: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(3, 5)
    gm = fxreg.transform(model, ODD_RULES if clips else ODD_RULES[:-1])

    def losses(module: nn.Module) -> Tensor:
        return sum(((k + 1) * module(x + k)[0]).square().sum() for k in range(calls))  # type: ignore[return-value]

    compiled = torch.compile(losses, backend=backend, fullgraph=True)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):
        found = torch.autograd.grad(compiled(gm), list(parameters.values()))
        actual: Any = dict(zip(parameters, found, strict=True))
        expected: Any = {n: torch.zeros_like(p) for n, p in parameters.items()}
        for k in range(calls):
            one = ((k + 1) * model(x + k)[0]).square().sum()
            got = torch.autograd.grad(one, list(parameters.values()), allow_unused=True)
            for (name, parameter), gradient in zip(parameters.items(), got, strict=True):
                if gradient is not None and clips and name == "a.weight":
                    gradient = gradient * (0.5 / (gradient.norm() + 1e-6)).clamp(max=1.0)
                expected[name] += 0 if gradient is None else gradient
                (own,) = torch.autograd.grad(odd_penalty(model), [parameter])
                expected[name] += own
        assert_same(actual, expected, 1e-4)
        assert all(not p._backward_hooks for p in model.parameters())


def test_compiled_no_grad_graph_holds_no_penalty() -> None:
    model, (x,) = build("mlp")
    gm = fxreg.transform(model, terms_rules("penalty"))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(gm, backend=aot_autograd(fw_compiler=keep))(x)
    (graph,) = graphs
    targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_function" and node.users}
    assert not {t for t in targets if "sum" in t or "abs" in t or "sign" in t}


def terms_rules(lowering: str) -> list[fxreg.Rule]:
    return [term.rule for term in terms_of(lowering)]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))])
def test_a_copy_of_a_module_that_was_compiled_in_place_is_its_own(copied: Any) -> None:
    gm = fxreg.transform(nn.Linear(3, 2), fxreg.Rule(fxreg.l1(0.1)))
    gm.compile(backend="eager", fullgraph=True)
    gm(torch.ones(2, 3))
    other = copied(gm)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(torch.ones(2, 3)).any()
