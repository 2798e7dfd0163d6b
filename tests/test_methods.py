"""The three methods of old (weight_decay, a sum in the loss, hooks), written by hand, against the rules that replace
them; and the facts about torch that docs/methods.md states.
"""

import doctest
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import fxreg
from fxreg.effects import Definition

from . import effects

STEPS = 20
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}
PAGES = Path(__file__).parent.parent / "docs"


WITH_EXAMPLES = sorted(path.name for path in PAGES.glob("*.md") if ">>> " in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", WITH_EXAMPLES)
def test_every_example_on_the_page_says_what_it_does(page: str) -> None:
    # A fence right behind an example would be read as its output: blank them, and keep the line numbers.
    text = re.sub(r"^```.*$", "", (PAGES / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    examples = doctest.DocTestParser().get_doctest(text, {"__name__": "__main__"}, page, page, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.FAIL_FAST)
    report: list[str] = []
    runner.run(examples, out=report.append)
    assert runner.failures == 0, "".join(report)


def test_the_pages_have_not_lost_their_examples() -> None:
    pages = {"activations.md", "anchors.md", "methods.md", "injection.md", "exported.md", "capture.md"}
    assert pages <= {*WITH_EXAMPLES}


def test_the_page_of_effects_is_what_the_registry_says() -> None:
    assert effects.PAGE.read_text(encoding="utf-8") == effects.page()
    for name in (name for name in fxreg.__all__ if isinstance(getattr(fxreg, name), Definition)):
        assert f"| `{name}(" in effects.page()


# By hand and by rule, step by step.

X = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(16, 3).sin()
Y = torch.linspace(1, -1, 16, dtype=torch.float64).reshape(16, 1).cos()


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def weights(model: nn.Module) -> list[nn.Parameter]:
    """What is regularized here: the weights and not the biases."""
    return [p for name, p in model.named_parameters() if name.endswith("weight")]


def loss_of(model: nn.Module) -> Tensor:
    return (model(X) - Y).square().mean()


Way = Callable[[nn.Module, type[optim.Optimizer], dict[str, Any]], tuple[optim.Optimizer, Callable[[], Tensor]]]
"""(model, optimizer class, its options) to the optimizer and the function that computes the loss."""


def loss_term(penalty: Callable[[Tensor], Tensor]) -> Way:
    def way(model: nn.Module, cls: type[optim.Optimizer], options: dict[str, Any]) -> Any:
        return cls(model.parameters(), **options), lambda: loss_of(model) + sum(penalty(w) for w in weights(model))

    return way


def weight_decay(d: float) -> Way:
    def way(model: nn.Module, cls: type[optim.Optimizer], options: dict[str, Any]) -> Any:
        chosen = {id(w) for w in weights(model)}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        groups = [{"params": weights(model), "weight_decay": d}, {"params": rest, "weight_decay": 0.0}]
        return cls(groups, **options), lambda: loss_of(model)

    return way


def parameter_hooks(gradient: Callable[[Tensor], Tensor]) -> Way:
    def way(model: nn.Module, cls: type[optim.Optimizer], options: dict[str, Any]) -> Any:
        for w in weights(model):
            w.register_hook(lambda g, w=w: g + gradient(w.detach()))
        return cls(model.parameters(), **options), lambda: loss_of(model)

    return way


def post_accumulate_hooks(gradient: Callable[[Tensor], Tensor]) -> Way:
    def way(model: nn.Module, cls: type[optim.Optimizer], options: dict[str, Any]) -> Any:
        for w in weights(model):
            w.register_post_accumulate_grad_hook(lambda w: add_to_grad(w, gradient(w.detach())))
        return cls(model.parameters(), **options), lambda: loss_of(model)

    return way


def add_to_grad(parameter: Tensor, addition: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad += addition


def rule(effect: Any, via: Any, emit: Any = "backward") -> Way:
    def way(model: nn.Module, cls: type[optim.Optimizer], options: dict[str, Any]) -> Any:
        rules = [fxreg.Rule(effect, param="weight", via=via)]
        groups = fxreg.param_groups(model, rules, cls) if via == "optimizer" else model.parameters()
        gm = fxreg.transform(model, rules, emit=emit)

        def with_penalty() -> Tensor:
            output, penalty = gm(X)
            return (output - Y).square().mean() + penalty

        return cls(groups, **options), with_penalty if emit == "output" else lambda: loss_of(gm)

    return way


LAMBDA = 0.01

L2: dict[str, Way] = {
    "weight_decay=2λ": weight_decay(2 * LAMBDA),
    "parameter hooks": parameter_hooks(lambda w: 2 * LAMBDA * w),
    "via='optimizer'": rule(fxreg.l2(LAMBDA), "optimizer"),
    "via='penalty'": rule(fxreg.l2(LAMBDA), "penalty"),
    "via='gradient'": rule(fxreg.l2(LAMBDA), "gradient"),
    "emit='output'": rule(fxreg.l2(LAMBDA), "penalty", "output"),
}
L1: dict[str, Way] = {
    "parameter hooks": parameter_hooks(lambda w: LAMBDA * w.sign()),
    "post-accumulate hooks": post_accumulate_hooks(lambda w: LAMBDA * w.sign()),
    "via='penalty'": rule(fxreg.l1(LAMBDA), "penalty"),
    "via='gradient'": rule(fxreg.l1(LAMBDA), "gradient"),
    "emit='output'": rule(fxreg.l1(LAMBDA), "penalty", "output"),
}
OPTIMIZERS: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "SGD": (optim.SGD, {"lr": 0.1}),
    "SGD with momentum": (optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "Adam": (optim.Adam, {"lr": 0.02}),
}


def assert_same_steps(way: Way, reference: Way, optimizer: str) -> None:
    """Train two models side by side; parameters agree after every step, and gradients where both are whole."""
    cls, options = OPTIMIZERS[optimizer]
    model, other = make(), make()
    (first, loss), (second, expected) = way(model, cls, options), reference(other, cls, options)
    for step in range(STEPS):
        for chosen, value in ((first, loss), (second, expected)):
            chosen.zero_grad()
            value().backward()
            chosen.step()
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, **TOLERANCE, msg=lambda m, at=f"{name}, step {step}": f"{at}: {m}")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("way", L2)
def test_every_way_to_l2_trains_as_the_sum_in_the_loss(way: str, optimizer: str) -> None:
    assert_same_steps(L2[way], loss_term(lambda w: LAMBDA * w.square().sum()), optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("way", L1)
def test_every_way_to_l1_trains_as_the_sum_in_the_loss(way: str, optimizer: str) -> None:
    assert_same_steps(L1[way], loss_term(lambda w: LAMBDA * w.abs().sum()), optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("d", [LAMBDA, 4 * LAMBDA], ids=["λ", "4λ"])
def test_no_other_weight_decay_trains_so(d: float, optimizer: str) -> None:
    with pytest.raises(AssertionError, match=r"weight, step [01]"):
        assert_same_steps(weight_decay(d), loss_term(lambda w: LAMBDA * w.square().sum()), optimizer)


@pytest.mark.parametrize(
    ("effect", "via", "expected"),
    [
        (fxreg.l1(LAMBDA), "penalty", lambda w: LAMBDA * w.sign()),
        (fxreg.l1(LAMBDA), "gradient", lambda w: LAMBDA * w.sign()),
        (fxreg.l2(LAMBDA), "penalty", lambda w: 2 * LAMBDA * w),
        (fxreg.l2(LAMBDA), "gradient", lambda w: 2 * LAMBDA * w),
    ],
)
def test_the_gradient_of_a_rule_is_the_hand_written_one(effect: Any, via: Any, expected: Any) -> None:
    model, plain = make(), make()
    for m in (model, plain):
        with torch.no_grad():
            m[0].weight[0, 0] = 0.0  # the kink
    gm = fxreg.transform(model, fxreg.Rule(effect, param="weight", via=via))
    loss_of(gm).backward()
    loss_of(plain).backward()
    for w, v in zip(weights(model), weights(plain), strict=True):
        torch.testing.assert_close(w.grad, v.grad + expected(v.detach()), **TOLERANCE)
    assert model[0].weight.grad[0, 0] == plain[0].weight.grad[0, 0]


# (a) The optimizer's weight_decay.


def decay_of(cls: type[optim.Optimizer], w: Tensor, d: float, lr: float) -> Tensor:
    """The step an optimizer takes at a zero gradient: decay and nothing else."""
    p = nn.Parameter(w.clone())
    p.grad = torch.zeros_like(p)
    cls([p], lr=lr, weight_decay=d).step()
    return p.detach() - w


def test_weight_decay_d_adds_d_w_and_not_2_d_w() -> None:
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(decay_of(optim.SGD, w, 0.3, lr=1.0), -0.3 * w, **TOLERANCE)
    v = w.clone().requires_grad_()
    (0.15 * v.square().sum()).backward()  # d/2·Σw²
    torch.testing.assert_close(-v.grad, decay_of(optim.SGD, w, 0.3, lr=1.0), **TOLERANCE)


def test_adamw_shrinks_by_lr_d_w_and_adam_does_not() -> None:
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(decay_of(optim.AdamW, w, 0.3, lr=0.1), -0.1 * 0.3 * w, **TOLERANCE)
    # Adam's first step is lr·sign of the gradient, whatever its size.
    torch.testing.assert_close(decay_of(optim.Adam, w, 0.3, lr=0.1), -0.1 * w.sign(), rtol=1e-6, atol=0)


def test_weight_decay_falls_on_biases_unless_groups_say_otherwise() -> None:
    model = make()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1).step()
    assert not torch.equal(model[0].bias, make()[0].bias)
    model = make()
    rules = [fxreg.Rule(fxreg.l2(0.05), param="weight", via="optimizer")]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optim.SGD(fxreg.param_groups(model, rules), lr=0.1).step()
    assert torch.equal(model[0].bias, make()[0].bias)
    assert not torch.equal(model[0].weight, make()[0].weight)


def test_weight_decay_spares_a_parameter_without_gradient() -> None:
    p = nn.Parameter(torch.ones(2))
    optim.SGD([p], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(p.detach(), torch.ones(2))


def test_clipping_takes_a_loss_term_with_it_and_leaves_weight_decay_whole() -> None:
    model, other = make(), make()
    (loss_of(model) + 10 * sum(w.square().sum() for w in model.parameters())).backward()
    loss_of(other).backward()
    for m, d in ((model, 0.0), (other, 20.0)):
        nn.utils.clip_grad_norm_(m.parameters(), 1e-3)
        optim.SGD(m.parameters(), lr=0.01, weight_decay=d).step()
    moved = [float((m[0].weight - make()[0].weight).detach().norm()) for m in (model, other)]
    assert moved[0] <= 1.001e-5
    assert moved[1] > 0.1


def test_with_maximize_weight_decay_still_shrinks() -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    p.grad = torch.zeros_like(p)
    optim.SGD([p], lr=0.1, weight_decay=0.5, maximize=True).step()
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.95, dtype=torch.float64))


# (b) The sum in the loss.


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.decode = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decode(self.embed(tokens))


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied().double()


TOKENS = torch.tensor([0, 3, 4])

OVER_NAMES: dict[str, Callable[[nn.Module], Iterator[Tensor]]] = {
    "state_dict(keep_vars=True)": lambda m: iter(m.state_dict(keep_vars=True).values()),
    "named_parameters(remove_duplicate=False)": lambda m: (p for _, p in m.named_parameters(remove_duplicate=False)),
    "layers": lambda m: (layer.weight for layer in m.modules() if isinstance(layer, nn.Embedding | nn.Linear)),
}


def tied_gradient(factor: float) -> Tensor:
    """The loss's gradient and so many times that of the penalty."""
    model = tied()
    model(TOKENS).square().mean().backward()
    return model.embed.weight.grad + factor * LAMBDA * model.embed.weight.detach().sign()


@pytest.mark.parametrize("over", OVER_NAMES)
def test_a_sum_over_names_or_layers_counts_a_tied_weight_twice(over: str) -> None:
    model = tied()
    (model(TOKENS).square().mean() + LAMBDA * sum(w.abs().sum() for w in OVER_NAMES[over](model))).backward()
    torch.testing.assert_close(model.embed.weight.grad, tied_gradient(2), **TOLERANCE)


def test_a_sum_over_the_state_dict_counts_twice_in_the_value_and_not_at_all_in_the_gradient() -> None:
    model = tied()
    penalty = sum(w.abs().sum() for w in model.state_dict().values())
    torch.testing.assert_close(penalty, 2 * model.embed.weight.detach().abs().sum(), **TOLERANCE)
    (model(TOKENS).square().mean() + LAMBDA * penalty).backward()
    torch.testing.assert_close(model.embed.weight.grad, tied_gradient(0), **TOLERANCE)


@pytest.mark.parametrize("via", ["penalty", "gradient"])
def test_a_rule_counts_a_tied_weight_once(via: Any) -> None:
    model = tied()
    fxreg.transform(model, fxreg.Rule(fxreg.l1(LAMBDA), via=via))(TOKENS).square().mean().backward()
    torch.testing.assert_close(model.embed.weight.grad, tied_gradient(1), **TOLERANCE)


def test_a_penalty_left_outside_the_division_counts_in_every_micro_batch() -> None:
    outside, inside, whole = make(), make(), make()
    for x, y in zip(X.chunk(4), Y.chunk(4), strict=True):
        loss, penalty = (outside(x) - y).square().mean(), LAMBDA * outside[0].weight.abs().sum()
        (loss / 4 + penalty).backward()
        loss, penalty = (inside(x) - y).square().mean(), LAMBDA * inside[0].weight.abs().sum()
        ((loss + penalty) / 4).backward()
    loss_of(whole).backward()
    sign = LAMBDA * whole[0].weight.detach().sign()
    torch.testing.assert_close(outside[0].weight.grad, whole[0].weight.grad + 4 * sign, **TOLERANCE)
    torch.testing.assert_close(inside[0].weight.grad, whole[0].weight.grad + sign, **TOLERANCE)


def test_the_root_of_a_sum_of_squares_is_nan_at_zero_and_group_lasso_is_not() -> None:
    w = torch.zeros(2, 3, requires_grad=True)
    w.square().sum(dim=1).sqrt().sum().backward()
    assert w.grad.isnan().all()
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    fxreg.transform(model, fxreg.Rule(fxreg.group_lasso(1.0), param="weight"))(torch.zeros(1, 3)).sum().backward()
    assert torch.equal(model.weight.grad, torch.zeros(2, 3))


def test_a_sum_of_squares_overflows_in_float16_and_the_rule_does_not() -> None:
    model = nn.Linear(3, 2).half()
    nn.init.constant_(model.weight, 200.0)
    assert model.weight.square().sum().isinf()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l2(0.5), param="weight"))
    assert fxreg.penalties(gm)["l2"].item() == 0.5 * 6 * 200.0**2


def test_a_subgradient_step_of_l1_oscillates_around_zero_by_lr_lambda() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.105)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(1.0)))
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    seen = []
    for _ in range(20):
        optimizer.zero_grad()
        gm(torch.zeros(1, 1, dtype=torch.float64)).sum().backward()
        optimizer.step()
        seen.append(model.weight.item())
    assert seen[-4:] == pytest.approx([-0.005, 0.005, -0.005, 0.005])


# (c) Hooks.

EARLY = "Full backward hook is firing when gradients are computed with respect to module outputs"


def add_l1(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
    """The hook that people write."""
    for p in module.parameters(recurse=False):
        if p.grad is not None:
            p.grad.add_(LAMBDA * p.detach().sign())


def hooked() -> nn.Sequential:
    model = make()
    for layer in model:
        layer.register_full_backward_hook(add_l1)
    return model


def regularized_layers(model: nn.Module, plain: nn.Module) -> dict[str, bool]:
    """For every parameter, whether its gradient is the plain one plus λ·sign(w); anything else fails."""
    found = {}
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        found[name] = not torch.equal(p.grad, q.grad)
        torch.testing.assert_close(p.grad, q.grad + found[name] * LAMBDA * q.detach().sign(), **TOLERANCE)
    return found


def test_a_backward_hook_that_edits_param_grad_never_regularizes_the_first_layer() -> None:
    model, plain = hooked(), make()
    optimizers = [optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    for _ in range(3):
        plain.load_state_dict(model.state_dict())
        for optimizer in optimizers:
            optimizer.zero_grad()
        with pytest.warns(UserWarning, match=EARLY):
            loss_of(model).backward()
        loss_of(plain).backward()
        found = regularized_layers(model, plain)
        assert found == {name: not name.startswith("0.") for name in found}
        optimizers[0].step()


def test_with_gradients_zeroed_in_place_that_hook_works_by_accident() -> None:
    model, plain = hooked(), make()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.warns(UserWarning, match=EARLY):
        loss_of(model).backward()
    loss_of(plain).backward()
    assert all(regularized_layers(model, plain).values())


def test_where_the_input_needs_a_gradient_that_hook_reaches_the_first_layer() -> None:
    model, plain = hooked(), make()
    (model(X.clone().requires_grad_()) - Y).square().mean().backward()
    loss_of(plain).backward()
    assert all(regularized_layers(model, plain).values())


@pytest.mark.parametrize("via", ["penalty", "gradient"])
def test_a_rule_regularizes_the_first_layer(via: Any) -> None:
    model, plain = make(), make()
    loss_of(fxreg.transform(model, fxreg.Rule(fxreg.l1(LAMBDA), via=via))).backward()
    loss_of(plain).backward()
    assert all(regularized_layers(model, plain).values())


def test_module_hooks_registered_after_the_first_compiled_call_are_ignored() -> None:
    model, plain = make(), make()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(X)
    for layer in model:
        layer.register_full_backward_hook(add_l1)
    loss_of(compiled).backward()
    loss_of(plain).backward()
    assert not any(regularized_layers(model, plain).values())


def test_parameter_hooks_registered_after_the_first_compiled_call_still_fire() -> None:
    model, plain = make(), make()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(X)
    for p in model.parameters():
        p.register_hook(lambda g, p=p: g + LAMBDA * p.detach().sign())
    loss_of(compiled).backward()
    loss_of(plain).backward()
    assert all(regularized_layers(model, plain).values())


@pytest.mark.parametrize("via", ["penalty", "gradient"])
def test_a_compiled_rule_needs_no_hooks(via: Any) -> None:
    model, plain = make(), make()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(LAMBDA), via=via))
    loss_of(torch.compile(gm, backend="aot_eager", fullgraph=True)).backward()
    loss_of(plain).backward()
    assert all(regularized_layers(model, plain).values())


REPEATING = {
    "parameter hook": lambda p: p.register_hook(lambda g: g + LAMBDA * p.detach().sign()),
    "post-accumulate hook": lambda p: p.register_post_accumulate_grad_hook(
        lambda p: add_to_grad(p, LAMBDA * p.detach().sign())
    ),
}


def accumulated(model: nn.Module, run: nn.Module) -> Tensor:
    """The gradient of the first weight over four micro-batches of a loss divided by four."""
    for x, y in zip(X.chunk(4), Y.chunk(4), strict=True):
        ((run(x) - y).square().mean() / 4).backward()
    return model[0].weight.grad


@pytest.mark.parametrize("kind", REPEATING)
def test_the_penalty_of_a_hook_repeats_with_every_micro_batch(kind: str) -> None:
    model, plain = make(), make()
    for p in model.parameters():
        REPEATING[kind](p)
    loss_of(plain).backward()
    expected = plain[0].weight.grad + 4 * LAMBDA * plain[0].weight.detach().sign()
    torch.testing.assert_close(accumulated(model, model), expected, **TOLERANCE)


@pytest.mark.parametrize("via", ["penalty", "gradient"])
def test_told_of_the_micro_batches_the_penalty_of_a_rule_does_not_repeat(via: Any) -> None:
    model, plain = make(), make()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(LAMBDA), via=via))
    fxreg.set_loss_scale(gm, 1 / 4)
    loss_of(plain).backward()
    expected = plain[0].weight.grad + LAMBDA * plain[0].weight.detach().sign()
    torch.testing.assert_close(accumulated(model, gm), expected, **TOLERANCE)


@pytest.mark.parametrize("kind", REPEATING)
def test_a_hook_never_fires_where_no_gradient_arrives(kind: str) -> None:
    p = nn.Parameter(torch.ones(2))
    other = nn.Parameter(torch.ones(2))
    REPEATING[kind](p)
    other.sum().backward()
    assert p.grad is None
