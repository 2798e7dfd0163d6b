"""The emitted module's gradients are those of the hand-written loss, in every context in which people train.

Models × contexts × emits × lowerings is a product of thousands; a pairwise covering design of it runs. Every cell
compares with autograd of the hand-written loss on a copy of the original model, in the same context where the context
changes numbers.
"""

import copy
import io
import itertools
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fxreg

from .models import CASES, build
from .reference import Gradients, Term, assert_same, by_hand, objective, penalty_terms, transform_terms, twin

pytestmark = [  # torch's own: of vmap without a batching rule, and of Dynamo looking at its inputs after a graph break
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # of its forward mode
]

EMITS = ("backward", "output", "loss")
LOWERINGS = ("penalty", "gradient", "transform", "mixed")


class WithLoss(nn.Module):
    """A model that returns its own loss, as emit='loss' wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Any]:
        output = self.model(x)
        loss = output.square().mean() + (output.softmax(-1) * output.tanh()).mean() + output.select(-1, 0).mean()
        return {"loss": loss, "count": 3, "nothing": None}


def terms_of(lowering: str) -> list[Term]:
    match lowering:
        case "penalty" | "gradient":
            return penalty_terms(lowering)
        case "transform":
            return transform_terms()
    return [*transform_terms(), *penalty_terms("penalty")]


def loss_of(output: Any, emit: str) -> Tensor:
    match emit:
        case "backward":
            return objective(output)
        case "output":
            return objective(output[0]) + output[1]
    return output["loss"]


def gradients_of(model: nn.Module, loss: Tensor) -> Gradients:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))


class Cell:
    """One combination: the model, what was emitted from it, and the hand-written gradients."""

    def __init__(self, name: str, emit: str, lowering: str, dtype: torch.dtype = torch.float32) -> None:
        self.emit, self.terms = emit, terms_of(lowering)
        self.model, self.inputs = build(name, dtype)
        if emit == "loss":
            self.model = WithLoss(self.model)
        self.original = twin(self.model)
        rules = [term.rule for term in self.terms]
        self.gm = fxreg.transform(self.model, rules, emit=emit)

    def expected(self, run: Callable[[nn.Module], Any] | None = None, factor: float = 1.0) -> Gradients:
        torch.manual_seed(7)
        output = run(self.original) if run else self.original(*self.inputs)
        return by_hand(self.original, output["loss"] if self.emit == "loss" else objective(output), self.terms, factor)

    def actual(self, run: Callable[[nn.Module], Any] | None = None, module: nn.Module | None = None) -> Gradients:
        torch.manual_seed(7)
        module = self.gm if module is None else module
        output = run(module) if run else module(*self.inputs)
        return gradients_of(self.model, loss_of(output, self.emit))


def eager(cell: Cell, tolerance: float) -> None:
    assert_same(cell.actual(), cell.expected(), tolerance)


def evaluation(cell: Cell, tolerance: float) -> None:
    cell.gm.eval()
    cell.original.eval()
    if cell.emit == "loss":  # the penalty is in the loss in training mode only
        cell.terms = [term for term in cell.terms if term.penalty is None or term.via == "gradient"]
    assert_same(cell.actual(), cell.expected(), tolerance)


def aot_eager(cell: Cell, tolerance: float) -> None:
    compiled = torch.compile(cell.gm, backend="aot_eager", fullgraph=_compiles_whole(cell))
    assert_same(cell.actual(module=compiled), cell.expected(), tolerance)


def _compiles_whole(cell: Cell) -> bool:
    try:
        torch.compile(twin(cell.model), backend="eager", fullgraph=True)(*cell.inputs)
    except torch._dynamo.exc.Unsupported:
        return False
    finally:
        torch._dynamo.reset()
    return True


def functional(module: nn.Module, cell: Cell, parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    return loss_of(torch.func.functional_call(module, parameters, inputs), cell.emit)


def func_grad(cell: Cell, tolerance: float) -> None:
    torch.manual_seed(7)
    parameters = {n: p.detach() for n, p in cell.gm.named_parameters()}
    found = torch.func.grad(lambda p: functional(cell.gm, cell, p, *cell.inputs))(parameters)
    assert_same(dict(found), cell.expected(), tolerance)


def func_vmap(cell: Cell, tolerance: float) -> None:
    parameters = {n: p.detach() for n, p in cell.gm.named_parameters()}
    samples = cell.inputs[0][:3].unsqueeze(1)
    per_sample = torch.func.vmap(
        torch.func.grad(lambda p, x: functional(cell.gm, cell, p, x)), in_dims=(None, 0), randomness="different"
    )
    found = per_sample(parameters, samples)
    for k, sample in enumerate(samples):
        wanted = cell.expected(lambda model, sample=sample: model(sample))
        assert_same({name: g[k] for name, g in found.items()}, wanted, tolerance)


def func_vmap_compiled(cell: Cell, tolerance: float) -> None:
    parameters = {n: p.detach() for n, p in cell.gm.named_parameters()}
    samples = cell.inputs[0][:2].unsqueeze(1)

    def per_sample(parameters: dict[str, Tensor], samples: Tensor) -> dict[str, Tensor]:
        grad = torch.func.grad(lambda p, x: functional(cell.gm, cell, p, x))
        return torch.func.vmap(grad, in_dims=(None, 0), randomness="different")(parameters, samples)

    found = torch.compile(per_sample, backend="aot_eager")(parameters, samples)
    for k, sample in enumerate(samples):
        wanted = cell.expected(lambda model, sample=sample: model(sample))
        assert_same({name: g[k] for name, g in found.items()}, wanted, tolerance)


def export(cell: Cell, tolerance: float) -> None:
    program = torch.export.export(cell.gm, cell.inputs, strict=False)
    module = program.module()
    torch.manual_seed(7)
    loss = loss_of(module(*cell.inputs), cell.emit)
    parameters = dict(module.named_parameters())
    names = [name for name, _ in cell.model.named_parameters()]
    found = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
    assert_same(dict(zip(names, found, strict=True)), cell.expected(), tolerance)


def _copied(cell: Cell, tolerance: float, gm: nn.Module) -> None:
    torch.manual_seed(7)
    found = gradients_of(gm, loss_of(gm(*cell.inputs), cell.emit))
    assert_same(found, cell.expected(), tolerance)
    assert list(gm.state_dict()) == list(cell.original.state_dict())


def pickled(cell: Cell, tolerance: float) -> None:
    _copied(cell, tolerance, pickle.loads(pickle.dumps(cell.gm)))


def deepcopied(cell: Cell, tolerance: float) -> None:
    _copied(cell, tolerance, copy.deepcopy(cell.gm))


def saved(cell: Cell, tolerance: float) -> None:
    file = io.BytesIO()
    torch.save(cell.gm, file)
    file.seek(0)
    _copied(cell, tolerance, torch.load(file, weights_only=False))


def retraced(cell: Cell, tolerance: float) -> None:
    assert_same(cell.actual(module=torch.fx.symbolic_trace(cell.gm)), cell.expected(), tolerance)


def checkpointed(cell: Cell, tolerance: float) -> None:
    def run(model: nn.Module) -> Any:
        return checkpoint(model, *cell.inputs, use_reentrant=False)

    assert_same(cell.actual(run), cell.expected(run), tolerance)


def autocast(cell: Cell, tolerance: float) -> None:
    def run(model: nn.Module) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(*cell.inputs)

    # Autocast casts a leaf once and adds its uses' gradients in bfloat16; it casts a transformed weight at every use
    # and adds them in float32. The two agree to bfloat16's precision, and bitwise where a weight is used once.
    transformed = any(term.via == "gradient" or term.transform for term in cell.terms)
    assert_same(cell.actual(run), cell.expected(run), 2.0**-8 if transformed else tolerance)


def scaled(cell: Cell, tolerance: float) -> None:
    """A loss scaled by 1024, as under a GradScaler, and divided afterwards."""
    if cell.emit == "backward" or any(term.via == "gradient" or term.transform for term in cell.terms):
        fxreg.set_loss_scale(cell.gm, 1024.0)
    torch.manual_seed(7)
    loss = 1024.0 * loss_of(cell.gm(*cell.inputs), cell.emit)
    found = {n: g if g is None else g / 1024 for n, g in gradients_of(cell.model, loss).items()}
    assert_same(found, cell.expected(), tolerance)


def accumulated(cell: Cell, tolerance: float) -> None:
    """Two micro-batches with half the loss each: the gradients add up to the mean's."""
    fxreg.set_loss_scale(cell.gm, 0.5)
    torch.manual_seed(7)
    for _ in range(2):
        (0.5 * loss_of(cell.gm(*cell.inputs), cell.emit)).backward()
    actual = {name: p.grad for name, p in cell.model.named_parameters()}
    torch.manual_seed(7)
    halves = []
    for _ in range(2):
        output = cell.original(*cell.inputs)
        loss = output["loss"] if cell.emit == "loss" else objective(output)
        halves.append(by_hand(cell.original, loss, cell.terms, 0.5))
    expected = {
        name: None if first is None else first + halves[1][name]  # type: ignore[operator]
        for name, first in halves[0].items()
    }
    assert_same(actual, expected, tolerance)


def in_place_output(cell: Cell, tolerance: float) -> None:
    def run(model: nn.Module) -> Any:
        output = model(*cell.inputs)
        first = output["loss"] if isinstance(output, dict) else output[0] if isinstance(output, tuple) else output
        first.mul_(1.5)
        return output

    if cell.emit == "loss":  # 1.5 times the loss is 1.5 times its penalty too
        assert_same(cell.actual(run), by_hand_of(cell, 1.5), tolerance)
    else:
        assert_same(cell.actual(run), cell.expected(run), tolerance)


def by_hand_of(cell: Cell, factor: float) -> Gradients:
    """factor·(loss + penalties) where transforms see factor times the loss's gradient."""
    torch.manual_seed(7)
    loss = cell.original(*cell.inputs)["loss"]
    raw = [term for term in cell.terms if term.penalty is None]
    result = by_hand(cell.original, factor * loss, raw)
    parameters = dict(cell.original.named_parameters())
    for term in cell.terms:
        for name, p in parameters.items():
            if term.penalty and term.acts_on(name) and (result[name] is not None or term.via == "penalty"):
                weight = factor if term.via == "penalty" else 1.0
                (added,) = torch.autograd.grad(weight * term.penalty(p), p)
                result[name] = added if result[name] is None else result[name] + added
    return result


def penalized(cell: Cell, parameters: dict[str, Tensor]) -> Tensor:
    """loss + Σ penalties of the original model, by hand, as a function of its parameters."""
    torch.manual_seed(7)
    output = torch.func.functional_call(cell.original, parameters, cell.inputs)
    total = output["loss"] if cell.emit == "loss" else objective(output)
    for term in cell.terms:
        assert term.penalty is not None
        total = total + sum(term.penalty(p) for name, p in parameters.items() if term.acts_on(name))
    return total


def emitted(cell: Cell, parameters: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(7)
    return functional(cell.gm, cell, parameters, *cell.inputs)


@sdpa_kernel(SDPBackend.MATH)  # the fused kernels have no second derivative
def jvp(cell: Cell, tolerance: float) -> None:
    parameters = {n: p.detach() for n, p in cell.gm.named_parameters()}
    direction = {n: torch.randn_like(p) for n, p in parameters.items()}
    _, actual = torch.func.jvp(lambda p: emitted(cell, p), (parameters,), (direction,))
    _, expected = torch.func.jvp(lambda p: penalized(cell, p), (parameters,), (direction,))
    assert abs(float(actual - expected)) < tolerance * abs(float(expected))


def jacrev(cell: Cell, tolerance: float) -> None:
    parameters = {n: p.detach() for n, p in cell.gm.named_parameters()}
    actual = torch.func.jacrev(lambda p: torch.stack([emitted(cell, p)] * 2))(parameters)
    expected = torch.func.grad(lambda p: penalized(cell, p))(parameters)
    for row in range(2):
        assert_same({name: value[row] for name, value in actual.items()}, expected, tolerance)


@sdpa_kernel(SDPBackend.MATH)
def double_backward(cell: Cell, tolerance: float) -> None:
    """The gradient of the gradient's squared norm."""

    def second(loss: Tensor, parameters: list[Tensor]) -> tuple[Tensor | None, ...]:
        first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        return torch.autograd.grad(
            torch.stack([g.square().sum() for g in first if g is not None]).sum(), parameters, allow_unused=True
        )

    torch.manual_seed(7)
    parameters = dict(cell.model.named_parameters())
    actual = second(loss_of(cell.gm(*cell.inputs), cell.emit), list(parameters.values()))
    originals = dict(cell.original.named_parameters())
    expected = second(penalized(cell, originals), list(originals.values()))
    assert_same(dict(zip(parameters, actual, strict=True)), dict(zip(originals, expected, strict=True)), tolerance)


CONTEXTS = {
    context.__name__: context
    for context in (
        eager, evaluation, aot_eager, func_grad, func_vmap, func_vmap_compiled, export, pickled, deepcopied, saved,
        retraced, checkpointed, autocast, scaled, accumulated, in_place_output, jvp, jacrev, double_backward,
    )
}  # fmt: skip


def _possible(model: str, context: str, emit: str, lowering: str) -> bool:
    if context in ("jvp", "jacrev", "double_backward") and (emit == "backward" or lowering != "penalty"):
        return False  # what injection cannot do: tests/test_injection.py
    if (context, model) in {("jvp", "cnn"), ("jacrev", "cnn"), ("jvp", "lstm")}:
        return False  # as func_grad; fused recurrences have no forward mode
    if context.startswith("func_vmap") and not CASES[model].vmaps:
        return False  # the model itself does not: in-place batch statistics, fused recurrences
    # Batch norm writes into captured buffers, which torch.func refuses of the model itself.
    return (context, model) != ("func_grad", "cnn")


def covering(seed: int = 0) -> list[tuple[str, ...]]:
    """A pairwise covering design over the axes, greedy over random candidates: every possible pair occurs."""
    axes = (tuple(CASES), tuple(CONTEXTS), EMITS, LOWERINGS)
    cells = [cell for cell in itertools.product(*axes) if _possible(*cell)]
    wanted = {pair for cell in cells for pair in itertools.combinations(enumerate(cell), 2)}
    chosen = []
    generator = random.Random(seed)
    while wanted:
        sample = generator.sample(cells, min(200, len(cells)))
        best = max(sample, key=lambda c: len(wanted & set(itertools.combinations(enumerate(c), 2))))
        covered = wanted & set(itertools.combinations(enumerate(best), 2))
        if covered:
            chosen.append(best)
            wanted -= covered
    return sorted(chosen)


def _is_quick(model: str, context: str) -> bool:
    """Of the cells that compile, those of the small model in the quicker way."""
    return context != "func_vmap_compiled" and (model == "mlp" or context != "aot_eager")


@pytest.mark.parametrize(
    ("model", "context", "emit", "lowering"),
    [pytest.param(*cell, marks=() if _is_quick(*cell[:2]) else pytest.mark.slow) for cell in covering()],
)
def test_gradients_are_those_of_the_hand_written_loss(model: str, context: str, emit: str, lowering: str) -> None:
    torch._dynamo.reset()
    CONTEXTS[context](Cell(model, emit, lowering), 1e-5)


@pytest.mark.parametrize("emit", EMITS)
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("model", CASES)
def test_gradients_are_exact_in_float64(model: str, emit: str, lowering: str) -> None:
    eager(Cell(model, emit, lowering, torch.float64), 1e-12)
