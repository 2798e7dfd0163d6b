"""Whatever is registered conforms: in every context its gradient is that of the formula on the original model; and
whoever registers an effect of their own gets all of it."""

import copy
import linecache
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import fxreg
from fxreg.effects import registry
from fxreg.functions import FunctionPenalty

from .marks import in_turn, some
from .reference import Gradients, Term, assert_same, by_hand

briefly = settings(max_examples=30, deadline=None, derandomize=True)
BUILT_IN = {
    name: definition for name, definition in registry.items() if definition.function.__module__.startswith("fxreg.")
}


# A test's own effects, with everything an effect can have.


@fxreg.penalty
def registry_anchored(weight: Tensor, *, anchor: Tensor, dims: tuple[int, ...], power: float = 2.0) -> Tensor:
    """No closed form; a tensor, a tuple and a float."""
    return (weight - anchor).abs().pow(power).sum(dim=dims).sum()


@fxreg.penalty
def registry_huber(weight: Tensor, *, inner: fxreg.Strength, outer: fxreg.Strength, knee: float = 0.1) -> Tensor:
    """Two strengths and a closed form."""
    size = weight.abs()
    return torch.where(size < knee, inner * weight.square(), outer * size).sum()


@registry_huber.gradient
def _(weight: Tensor, *, inner: Tensor, outer: Tensor, knee: float = 0.1) -> Tensor:
    return torch.where(weight.abs() < knee, 2 * inner * weight, outer * weight.sign())


@fxreg.gradient
def registry_pull(grad: Tensor, weight: Tensor, *, rate: fxreg.Strength, sign: bool = False) -> Tensor:
    """A transform that reads the weight."""
    return grad - rate * (weight.sign() if sign else weight)


@fxreg.gradient
def registry_homing(
    grad: Tensor, weight: Tensor, *, rate: fxreg.Strength, home: fxreg.Anchor, also: fxreg.Anchor = None
) -> Tensor:
    """A transform with tensors for each parameter."""
    return grad + rate * (home - also)


@dataclass(frozen=True)
class Example:
    """An effect with arguments, and the same by hand: a penalty of w, or a transform of g, or of all of them."""

    effect: Any
    penalty: Callable[[Tensor], Tensor] | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    joint: Callable[[list[Tensor]], list[Tensor]] | None = None


def _rows(w: Tensor) -> Tensor:
    return sum((row.square().sum().sqrt() for row in w.unbind(1)), torch.zeros(()))


def _scad(x: Tensor) -> Tensor:
    """With λ = 0.1 and a = 3, for one absolute value."""
    if x <= 0.1:
        return 0.1 * x
    return (0.6 * x - x * x - 0.01) / 4 if x <= 0.3 else x.new_tensor(0.02)


def _mcp(x: Tensor) -> Tensor:
    """With λ = 0.1 and γ = 3, for one absolute value."""
    return 0.1 * x - x * x / 6 if x <= 0.3 else x.new_tensor(0.015)


def _means(w: Tensor) -> Tensor:
    """Of columns, between 0 and 1."""
    return w.clamp(0, 1).mean(0).clamp(2**-20, 1 - 2**-20)


ANCHOR = torch.arange(-8.0, 8.0).reshape(4, 4) / 8
FISHER = ANCHOR.square()
MASK = torch.tensor([[True], [False], [True], [True]])


def by_name(tensor: Tensor) -> dict[str, Tensor]:
    """The same tensor for every weight of a `Net`."""
    return {"first.weight": tensor, "second.weight": tensor}


def _homed(g: Tensor) -> Tensor:
    return g + 0.3 * (ANCHOR - FISHER)


EXAMPLES = {
    "l1": Example(fxreg.l1(0.3), penalty=lambda w: 0.3 * w.abs().sum()),
    "l2": Example(fxreg.l2(0.3), penalty=lambda w: 0.3 * (w * w).sum()),
    "elastic_net": Example(fxreg.elastic_net(0.3, 0.2), penalty=lambda w: 0.3 * w.abs().sum() + 0.2 * (w * w).sum()),
    "group_lasso": Example(fxreg.group_lasso(0.3, dim=1), penalty=lambda w: 0.3 * _rows(w)),
    "sparse_group_lasso": Example(
        fxreg.sparse_group_lasso(0.3, 0.2, dim=1, size=2),
        penalty=lambda w: 0.3 * w.abs().sum() + 0.2 * (w[:, :2].norm() + w[:, 2:].norm()),
    ),
    "max_norm": Example(
        fxreg.max_norm(0.3, limit=0.4, dim=(0, 1), size=2),
        penalty=lambda w: 0.3 * sum((b.norm() - 0.4).relu() for r in w.split(2) for b in r.split(2, 1)),
    ),
    "lp": Example(fxreg.lp(0.3, p=1.5), penalty=lambda w: 0.3 * (w.abs() * w.abs().sqrt()).sum()),
    "smooth_l1": Example(
        fxreg.smooth_l1(0.3, beta=0.2),
        penalty=lambda w: 0.3 * F.smooth_l1_loss(w, torch.zeros_like(w), reduction="sum", beta=0.2),
    ),
    "log_sum": Example(fxreg.log_sum(0.3, eps=0.1), penalty=lambda w: 0.3 * (1 + 10 * w.abs()).log().sum()),
    "scad": Example(fxreg.scad(0.1, a=3.0), penalty=lambda w: sum(map(_scad, w.abs().reshape(-1)))),
    "mcp": Example(fxreg.mcp(0.1, gamma=3.0), penalty=lambda w: sum(map(_mcp, w.abs().reshape(-1)))),
    "hoyer": Example(fxreg.hoyer(0.3), penalty=lambda w: 0.3 * w.abs().sum() / (w.norm() + 1e-8)),
    "entropy": Example(
        fxreg.entropy(0.3), penalty=lambda w: 0.3 * torch.special.entr(w.abs() / w.abs().sum().clamp_min(1e-30)).sum()
    ),
    "nuclear_norm": Example(fxreg.nuclear_norm(0.3), penalty=lambda w: 0.3 * torch.linalg.matrix_norm(w, "nuc")),
    "spectral": Example(
        fxreg.spectral(0.3, iterations=80), penalty=lambda w: 0.3 * torch.linalg.matrix_norm(w, 2).square()
    ),
    "orthogonal": Example(
        fxreg.orthogonal(0.3),
        penalty=lambda w: 0.3 * F.cosine_similarity(w[:, None], w[None], dim=-1).triu(1).abs().sum() / 6,
    ),
    "soft_orthogonal": Example(
        fxreg.soft_orthogonal(0.3), penalty=lambda w: 0.3 * torch.dist(w @ w.T, torch.eye(4)).square()
    ),
    "total_variation": Example(
        fxreg.total_variation(0.3),
        penalty=lambda w: 0.3 * ((w[1:] - w[:-1]).abs().sum() + (w[:, 1:] - w[:, :-1]).abs().sum()),
    ),
    "kl_sparsity": Example(
        fxreg.kl_sparsity(0.3, rho=0.2),
        penalty=lambda w: 0.3 * sum(0.2 * (0.2 / m).log() + 0.8 * (0.8 / (1 - m)).log() for m in _means(w)),
    ),
    "decorrelation": Example(
        fxreg.decorrelation(0.3), penalty=lambda w: 0.3 * torch.cov(w.T, correction=0).triu(1).square().sum()
    ),
    "variance": Example(fxreg.variance(0.3), penalty=lambda w: 0.3 * (1 - (w.var(0) + 1e-4).sqrt()).relu().mean()),
    "clip_value": Example(fxreg.clip_value(0.1), transform=lambda g: g.clamp(-0.1, 0.1)),
    "clip_norm": Example(fxreg.clip_norm(0.1), transform=lambda g: 0.1 * g / max(0.1, float(g.norm()) + 1e-6)),
    "clip_global_norm": Example(
        fxreg.clip_global_norm(0.1),
        joint=lambda grads: [0.1 * g / max(0.1, sum(float(h.square().sum()) for h in grads) ** 0.5) for g in grads],
    ),
    "clip_block_rms": Example(
        fxreg.clip_block_rms(0.1), transform=lambda g: g / max(1.0, 10 * float(g.square().mean().sqrt()))
    ),
    "adaptive_clip": Example(
        fxreg.adaptive_clip(1e-4, eps=10.0),
        transform=lambda g: torch.stack([r * min(1.0, 1e-3 / max(float(r.norm()), 1e-6)) for r in g]),
    ),
    "normalize": Example(fxreg.normalize(0.3), transform=lambda g: 0.3 * g / (g.norm() + 1e-6)),
    "trust_ratio": Example(fxreg.trust_ratio(0.3)),  # these two read the weight: by hand in test_effects
    "tangent": Example(fxreg.tangent()),
    "scale": Example(fxreg.scale(0.3), transform=lambda g: 0.3 * g),
    "freeze": Example(fxreg.freeze(), transform=torch.zeros_like),
    "mask": Example(fxreg.mask(MASK), transform=lambda g: g * MASK),
    "centralize": Example(fxreg.centralize(), transform=lambda g: g - g.sum(1, keepdim=True) / g.shape[1]),
    "zero_nans": Example(fxreg.zero_nans(), transform=lambda g: g),
    "add_noise": Example(fxreg.add_noise(0.3, seed=3)),  # by its distribution, in test_effects; here by eager mode
    "l2_sp": Example(fxreg.l2_sp(0.3, by_name(ANCHOR)), penalty=lambda w: 0.3 * torch.dist(w, ANCHOR).square()),
    "ewc": Example(
        fxreg.ewc(0.3, by_name(FISHER), by_name(ANCHOR)),
        penalty=lambda w: 0.3 * torch.dist(FISHER.sqrt() * w, FISHER.sqrt() * ANCHOR).square(),
    ),
    "registry_homing": Example(registry_homing(0.3, by_name(ANCHOR), by_name(FISHER)), transform=_homed),
    "registry_anchored": Example(
        registry_anchored(0.3, anchor=torch.tensor(0.25), dims=(0,)), penalty=lambda w: 0.3 * ((w - 0.25) ** 2).sum()
    ),
    "registry_huber": Example(
        registry_huber(inner=0.3, outer=0.2),
        penalty=lambda w: sum(0.3 * x * x if abs(x) < 0.1 else 0.2 * x.abs() for x in w.reshape(-1)),
    ),
}


class Net(nn.Module):
    """Two weights of one shape, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.second(torch.tanh(self.first(x)))))


def net(seed: int = 0) -> tuple[Net, Tensor]:
    torch.manual_seed(seed)
    return Net(), torch.randn(3, 4)


def loss_of(output: Tensor) -> Tensor:
    return (output * torch.arange(1.0, 1.0 + output.numel()).reshape(output.shape)).square().mean()


# Contexts: how the gradients of an emitted module are taken.


def eager(gm: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> Gradients:
    parameters = dict(gm.named_parameters())
    found = torch.autograd.grad(loss_of(gm(x) if run is None else run(x)), list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))


def aot_eager(gm: nn.Module, x: Tensor) -> Gradients:
    torch._dynamo.reset()
    return eager(gm, x, torch.compile(gm, backend="aot_eager", fullgraph=True))


def func_grad(gm: nn.Module, x: Tensor) -> Gradients:
    parameters = {name: p.detach() for name, p in gm.named_parameters()}
    return dict(torch.func.grad(lambda p: loss_of(torch.func.functional_call(gm, p, (x,))))(parameters))


def vmap_of_grad(gm: nn.Module, x: Tensor) -> Gradients:
    """Two samples, of which the first is the one asked for."""
    parameters = {name: p.detach() for name, p in gm.named_parameters()}
    grad = torch.func.grad(lambda p, sample: loss_of(torch.func.functional_call(gm, p, (sample,))))
    found = torch.func.vmap(grad, in_dims=(None, 0))(parameters, torch.stack([x, 2 * x]))
    return {name: g[0] for name, g in found.items()}


def deepcopied(gm: nn.Module, x: Tensor) -> Gradients:
    return eager(copy.deepcopy(gm), x)


def pickled(gm: nn.Module, x: Tensor) -> Gradients:
    return eager(pickle.loads(pickle.dumps(gm)), x)


def retraced(gm: nn.Module, x: Tensor) -> Gradients:
    return eager(torch.fx.symbolic_trace(gm), x)


CONTEXTS = (eager, aot_eager, func_grad, vmap_of_grad, deepcopied, pickled, retraced)
WAYS = [(name, via) for name in EXAMPLES for via in registry[name].vias if via in ("penalty", "gradient")]
COMPILED = some(in_turn(WAYS), every=2)


def expected(example: Example, rule: fxreg.Rule, x: Tensor) -> Gradients:
    """By hand on the original model; of a random effect, what a fresh module gives in eager mode."""
    model, _ = net()
    if example.penalty is None and example.transform is None and example.joint is None:
        return eager(fxreg.transform(model, rule), x)
    term = Term(
        rule, lambda name: name.endswith("weight"), example.penalty, example.transform, example.joint, rule.lowering
    )
    result = by_hand(model, loss_of(model(x)), [term])
    if example.effect.name == "freeze":
        result.update({"first.weight": None, "second.weight": None})
    return result


def test_every_built_in_effect_of_the_graph_has_an_example() -> None:
    in_graph = {name for name, d in BUILT_IN.items() if {"penalty", "gradient"} & set(d.vias)}
    in_graph -= {name for name, d in BUILT_IN.items() if isinstance(d, FunctionPenalty)}  # of no parameter: by hand
    assert in_graph - EXAMPLES.keys() == set()
    assert {name for name, example in EXAMPLES.items() if example.effect.definition is not registry[name]} == set()


def test_every_built_in_effect_is_public_under_its_name_and_documented() -> None:
    for name, definition in BUILT_IN.items():
        assert getattr(fxreg, name) is definition
        assert name in fxreg.__all__
        assert definition.__doc__
        assert ">>>" in definition.__doc__
        assert "Source:" in definition.__doc__


def test_public_names_are_what_they_say_and_not_the_modules_behind_them() -> None:
    for name in fxreg.__all__:
        assert callable(getattr(fxreg, name)) or name in ("Anchor", "Strength", "Stream"), name


QUICK = ("l1", "clip_norm")
"""Effects whose contexts are all among the quick tests."""


@pytest.mark.parametrize(
    ("name", "via", "context"),
    [
        pytest.param(
            name, via, context, id=f"{name}-{via}-{context.__name__}",
            marks=() if name in QUICK or context is eager else pytest.mark.slow,
        )
        for name, via in WAYS for context in CONTEXTS if context is not aot_eager or (name, via) in COMPILED
    ],
)  # fmt: skip
def test_in_every_context_the_gradient_is_the_formulas(name: str, via: Any, context: Any) -> None:
    example = EXAMPLES[name]
    rule = fxreg.Rule(example.effect, param="weight", via=via)
    model, x = net()
    gm = fxreg.transform(model, rule)
    assert_same(context(gm, x), expected(example, rule, x), 2e-6)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_changes_something(name: str) -> None:
    model, x = net()
    plain, found = eager(model, x), eager(fxreg.transform(model, fxreg.Rule(EXAMPLES[name].effect, param="weight")), x)
    changed = found["first.weight"] is None or not torch.equal(found["first.weight"], plain["first.weight"])
    assert changed == (name != "zero_nans")


def test_a_transform_may_read_the_weight() -> None:
    for sign, contexts in ((False, CONTEXTS), (True, (eager,))):
        model, x = net()
        plain = eager(model, x)
        gm = fxreg.transform(model, fxreg.Rule(registry_pull(0.5, sign=sign), name="first", param="weight"))
        for context in contexts:
            weight = model.first.weight.detach()
            wanted = plain["first.weight"] - 0.5 * (weight.sign() if sign else weight)
            torch.testing.assert_close(context(gm, x)["first.weight"], wanted)


# Properties.

KEYS: tuple[dict[str, Any], ...] = (
    {}, {"param": "weight"}, {"param": "bias"}, {"name": "first"}, {"layer": "Linear", "exclude": "second.*"},
)  # fmt: skip
PENALTIES: tuple[Callable[[float], Any], ...] = (
    fxreg.l1, fxreg.l2, fxreg.group_lasso, lambda s: fxreg.elastic_net(s, 0.5 * s),
    lambda s: registry_huber(s, 2 * s), lambda s: fxreg.group_lasso(s, dim=-1),
)  # fmt: skip


@st.composite
def penalty_rules(draw: st.DrawFn, strength: st.SearchStrategy[float]) -> list[fxreg.Rule]:
    factories = draw(st.lists(st.sampled_from(PENALTIES), min_size=1, max_size=4, unique=True))
    rules = []
    for factory in factories:
        keys = draw(st.sampled_from(KEYS))
        if factory is PENALTIES[-1] and fxreg.group_lasso in factories:
            keys = {"param": "weight"}  # on a vector the two are one
        effect = factory(draw(strength))
        rules.append(fxreg.Rule(effect, **keys, via=draw(st.sampled_from(effect.definition.vias[:2]))))
    return rules


@briefly
@given(penalty_rules(st.just(0.0)), st.sampled_from(["backward", "output"]))
def test_zero_strength_leaves_gradients_untouched(rules: list[fxreg.Rule], emit: Any) -> None:
    model, x = net()
    plain = eager(model, x)
    gm = fxreg.transform(model, rules, emit=emit)
    output = gm(x) if emit == "backward" else gm(x)[0]
    loss = loss_of(output) + (0 if emit == "backward" else gm(x)[1])
    for found, wanted in zip(torch.autograd.grad(loss, list(model.parameters())), plain.values(), strict=True):
        assert torch.equal(found, wanted)


@briefly
@given(penalty_rules(st.floats(0, 2)), st.randoms(use_true_random=False))
@pytest.mark.slow
def test_the_order_of_penalties_does_not_matter(rules: list[fxreg.Rule], random: Any) -> None:
    model, x = net()
    shuffled = random.sample(rules, len(rules))
    first, second = (eager(fxreg.transform(model, order), x) for order in (rules, shuffled))
    assert_same(first, second, 1e-6)


@briefly
@given(penalty_rules(st.floats(0, 2)), st.sampled_from(["backward", "output"]), st.booleans())
def test_strip_undoes_transform(rules: list[fxreg.Rule], emit: Any, clipped: bool) -> None:
    model, x = net()
    rules = [*rules, *([fxreg.Rule(fxreg.clip_norm(0.1), param="weight")] if clipped else [])]
    plain = fxreg.transform(model, [])
    gm = fxreg.transform(model, rules, emit=emit)
    assert gm.code != plain.code
    stripped = fxreg.strip(gm)
    assert stripped.code == plain.code
    assert stripped is not gm
    assert torch.equal(stripped(x), model(x))
    assert_same(eager(stripped, x), eager(model, x), 1e-12)
    assert all(one is other for one, other in zip(stripped.parameters(), model.parameters(), strict=True))


@briefly
@given(penalty_rules(st.floats(0, 2)))
def test_the_output_is_the_sum_of_the_penalties_that_are_penalties(rules: list[fxreg.Rule]) -> None:
    model, x = net()
    gm = fxreg.transform(model, rules, emit="output")
    output, total = gm(x)
    plan = fxreg.explain(gm).plan
    attached = {edit.label for edit in plan.edits} - {edit.label for edits in plan.pulls() for edit in edits}
    values = fxreg.penalties(gm)
    assert values.keys() == {edit.label for edit in plan.edits}
    wanted = sum(float(values[label]) for label in attached)
    assert float(total.detach()) == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    assert not any(value.requires_grad or value.ndim for value in values.values())
    assert torch.equal(output, model(x))


# Effects of one's own.


def gradient_from(effect: Any, **keys: Any) -> Tensor:
    """What an effect alone adds to the first weight."""
    model, x = net()
    gm = fxreg.transform(model, fxreg.Rule(effect, name="first", param="weight", **keys))
    return eager(gm, x)["first.weight"] - eager(model, x)["first.weight"]


def test_a_decorated_function_is_a_factory_with_its_name_strength_first() -> None:
    @fxreg.penalty
    def registry_own(weight: Tensor, *, eps: float = 1e-8) -> Tensor:
        """Of one's own."""
        return weight.abs().sum() + eps

    effect = registry_own(1e-3, eps=2)
    assert repr(effect) == "registry_own(0.001, eps=2.0)"
    assert registry_own(1e-3) == registry_own(strength=1e-3, eps=1e-8)
    assert registry_own.__doc__ == "Of one's own."
    assert registry["registry_own"] is registry_own
    assert effect.definition is registry_own
    torch.testing.assert_close(gradient_from(registry_own(0.5)), 0.5 * net()[0].first.weight.sign())


def _tripled(version: int) -> Any:
    """A cell of a notebook, run once more in every version."""
    if version == 1:

        @fxreg.penalty
        def registry_cell(weight: Tensor) -> Tensor:
            return weight.sum()

    elif version == 2:

        @fxreg.penalty
        def registry_cell(weight: Tensor) -> Tensor:
            return 3 * weight.sum()

    else:

        @fxreg.penalty
        def registry_cell(weight: Tensor, *, factor: float = 5.0) -> Tensor:
            return factor * weight.sum()

    return registry_cell


@pytest.mark.slow
def test_redefining_a_name_replaces_it_for_new_modules_and_for_no_old_one() -> None:
    model, x = net()
    plain = eager(model, x)["first.weight"]

    def added(gm: nn.Module, context: Any = eager) -> float:
        difference = context(gm, x)["first.weight"] - plain
        torch.testing.assert_close(difference, torch.full((4, 4), float(difference.mean())))
        return round(float(difference.mean()), 4)

    modules = []
    for version in (1, 2, 3, 3, 1):
        modules.append(fxreg.transform(model, fxreg.Rule(_tripled(version)(1.0), param="weight")))
        assert registry["registry_cell"] is modules[-1].fxreg.provenance.plan.edits[0].effect.definition
    assert [added(gm) for gm in modules] == [1, 3, 5, 5, 1]
    total = float(model.first.weight.detach().sum() + model.second.weight.detach().sum())
    for gm, factor in zip(modules, (1, 3, 5, 5, 1), strict=True):
        assert float(fxreg.penalties(gm)["registry_cell"]) == pytest.approx(factor * total, rel=1e-4, abs=1e-5)
    assert [added(gm, aot_eager) for gm in modules[:2]] == [1, 3]
    assert [added(copy.deepcopy(gm)) for gm in modules] == [1, 3, 5, 5, 1]


SESSION = """
import torch, fxreg
CELLS = (("", "w.sum()"), ("", "2 * w.sum()"), (", *, by: float = 1.0", "by * w.sum()"))
for arguments, body in CELLS:
    exec(f"@fxreg.penalty\\ndef cell(w: torch.Tensor{arguments}) -> torch.Tensor:\\n    return {body}")
    model = torch.nn.Linear(2, 2)
    fxreg.transform(model, fxreg.Rule(cell(1.0)))(torch.ones(1, 2)).sum().backward()
"""


@pytest.mark.slow
def test_a_session_that_redefines_effects_ends_cleanly() -> None:
    """Operators are deregistered at exit, all of them."""
    result = subprocess.run(
        [sys.executable, "-c", SESSION], capture_output=True, text=True, errors="replace", check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_a_transform_is_redefined_likewise() -> None:
    def cell(factor: float) -> Any:
        @fxreg.gradient
        def registry_times(grad: Tensor, weight: Tensor) -> Tensor:
            return factor * grad

        return registry_times

    model, x = net()
    plain = eager(model, x)["first.weight"]
    modules = [fxreg.transform(model, fxreg.Rule(cell(factor)())) for factor in (2.0, 3.0, 2.0)]
    for gm, factor in zip(modules, (2.0, 3.0, 2.0), strict=True):
        torch.testing.assert_close(eager(gm, x)["first.weight"], factor * plain)


@pytest.mark.parametrize("size", [1, 5_000])
def test_formulas_that_differ_only_in_what_they_enclose_are_different(size: int) -> None:
    """Beyond a thousand elements a tensor's repr no longer tells them apart."""

    def cell(enclosed: Tensor) -> Any:
        @fxreg.penalty
        def registry_enclosing(weight: Tensor) -> Tensor:
            return weight.sum() * enclosed.sum()

        return registry_enclosing

    other = torch.ones(size)
    other[size // 2] = 7.0
    model, x = net()
    first = fxreg.transform(model, fxreg.Rule(cell(torch.ones(size))(1.0), param="weight"))
    second = fxreg.transform(model, fxreg.Rule(cell(other)(1.0), param="weight"))
    plain = eager(model, x)["first.weight"]
    for gm, factor in ((first, size), (second, size + 6)):
        torch.testing.assert_close(eager(gm, x)["first.weight"] - plain, torch.full((4, 4), float(factor)))


@pytest.mark.parametrize("with_source", [True, False], ids=["notebook", "prompt"])
def test_effects_typed_into_a_session_are_redefined_too(with_source: bool) -> None:
    def run(cell: int, source: str) -> Any:
        source = f"import fxreg\nfrom torch import Tensor\n@fxreg.penalty\n{source}"
        name = f"<cell {cell}>"
        if with_source:
            linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        space: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(source, name, "exec"), space)
        return space["registry_typed"]

    model, x = net()
    plain = eager(model, x)["first.weight"]
    sources = {
        1.0: "def registry_typed(weight: Tensor) -> Tensor:\n    return weight.sum()",
        2.0: "def registry_typed(weight: Tensor) -> Tensor:\n    return 2 * weight.sum()",
        0.5: "def registry_typed(weight: Tensor, *, by: float = 2.0) -> Tensor:\n    return weight.sum() / by",
        4.0: "def registry_typed(weight: Tensor, *, by: float = 4.0) -> Tensor:\n    return weight.sum() * by",
    }
    modules = {
        factor: fxreg.transform(model, fxreg.Rule(run(cell, source)(1.0), param="weight"))
        for cell, (factor, source) in enumerate(sources.items())
    }
    for factor, gm in modules.items():
        torch.testing.assert_close(eager(gm, x)["first.weight"] - plain, torch.full((4, 4), factor))


@pytest.mark.parametrize(
    ("arguments", "kinds"),
    [(("by: float", "by: int", "by: str"), (float, int, str)), (("by: float", "times: float"), (float, float))],
    ids=["another type", "another name"],
)
def test_an_argument_that_changes_at_a_prompt_changes_the_effect(arguments: Any, kinds: Any) -> None:
    """Without source there is only the code object, which knows neither annotations nor, in its bytes, names."""
    for argument, kind in zip(arguments, kinds, strict=True):
        name = argument.partition(":")[0]
        space: dict[str, Any] = {}
        exec(
            "import fxreg\nfrom torch import Tensor\nseen = []\n@fxreg.penalty\n"
            f"def registry_prompted(weight: Tensor, *, {argument}) -> Tensor:\n"
            f"    return seen.append({name}) or weight.sum()",
            space,
        )
        gradient_from(space["registry_prompted"](1.0, **{name: kind(3)}))
        assert {type(value) for value in space["seen"]} == {kind}


def test_typed_arguments_reach_the_formula_as_they_were_given() -> None:
    seen: list[dict[str, Any]] = []

    @fxreg.penalty
    def registry_seeing(
        weight: Tensor,
        *,
        real: float,
        whole: int,
        flag: bool,
        word: str,
        tensor: Tensor,
        dims: tuple[int, ...],
        dim: int | tuple[int, ...],
        reals: tuple[float, ...] = (0.5, 1.0),
    ) -> Tensor:
        seen.append(
            {"real": real, "whole": whole, "flag": flag, "word": word, "dims": dims, "dim": dim, "reals": reals}
        )
        return (weight * tensor).sum()

    tensor = torch.arange(16.0).reshape(4, 4)
    given_ = {"real": 0.1, "whole": -3, "flag": True, "word": "α b", "dims": (1, 0), "dim": (-1,), "reals": (0.1, 2.0)}
    torch.testing.assert_close(gradient_from(registry_seeing(1.0, tensor=tensor, **given_)), tensor)
    assert seen
    for arguments in seen:
        assert arguments == given_
        assert {name: type(value) for name, value in arguments.items()} == {
            name: type(value) for name, value in given_.items()
        }


@pytest.mark.parametrize(
    "wrong", [{"whole": 0.5}, {"flag": 1}, {"word": b"a"}, {"tensor": 1.0}, {"dims": 0.5}, {"other": 1}]
)
def test_arguments_of_another_type_are_rule_errors(wrong: dict[str, Any]) -> None:
    @fxreg.penalty
    def registry_strict(
        weight: Tensor, *, whole: int = 1, flag: bool = True, word: str = "", tensor: Tensor, dims: tuple[int, ...] = ()
    ) -> Tensor:
        return weight.sum()

    arguments = {"tensor": torch.ones(1), **wrong}
    with pytest.raises(fxreg.RuleError, match=next(iter(wrong))):
        registry_strict(1.0, **arguments)


def _annotated(annotation: Any) -> Callable[..., Any]:
    def registry_refused(first: Tensor, second: Tensor, *, odd) -> Tensor:  # type: ignore[no-untyped-def]
        return first.sum()

    if annotation is not ...:
        registry_refused.__annotations__["odd"] = annotation
    return registry_refused


@pytest.mark.parametrize(
    "annotation",
    [
        list,
        dict,
        dict[str, int],
        complex,
        bytes,
        object,
        None,
        Callable,
        list[Tensor],
        set[int],
        "Unwritten",
        nn.Module,
    ],
    ids=str,
)
def test_an_annotation_that_no_operator_takes_is_a_rule_error(annotation: Any) -> None:
    before = dict(registry)
    with pytest.raises(fxreg.RuleError, match="registry_refused"):
        fxreg.gradient(_annotated(annotation))
    assert registry == before


def test_neither_annotation_nor_default_is_a_rule_error_that_names_both() -> None:
    with pytest.raises(fxreg.RuleError, match=r"'registry_refused'.*'odd'"):
        fxreg.gradient(_annotated(...))


def _takes_args(weight: Tensor, *args: float) -> Tensor:
    return weight.sum()


def _takes_kwargs(weight: Tensor, **kwargs: float) -> Tensor:
    return weight.sum()


def _takes_keywords(*, weight: Tensor) -> Tensor:
    return weight.sum()


def _takes_nothing() -> Tensor:
    return torch.zeros(())


def _takes_strength(weight: Tensor, *, strength: float) -> Tensor:
    return strength * weight.sum()


@pytest.mark.parametrize(
    "formula",
    [
        _takes_args,
        _takes_kwargs,
        _takes_keywords,
        _takes_nothing,
        _takes_strength,
        lambda weight: weight.sum(),
        3,
        None,
        "l1",
        int,
        nn.Linear,
    ],
    ids=["args", "kwargs", "keywords", "nothing", "strength", "lambda", "int", "None", "str", "type", "module"],
)
def test_what_is_no_formula_is_a_rule_error(formula: Any) -> None:
    if formula is None:  # `@fxreg.penalty()`, with options: still waiting for its function
        assert callable(fxreg.penalty(None))
        return
    with pytest.raises(fxreg.RuleError):
        fxreg.penalty(formula)


NAMES = ("value", "scale", "weight", "self", "grad", "tensors", "arguments", "seed", "out", "input", "args", "kwargs")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["penalty", "gradient"])
def test_an_argument_of_any_name_works_or_is_refused_when_it_is_defined(name: str, kind: str) -> None:
    space: dict[str, Any] = {}
    first = "w" if kind == "penalty" else "g, w"
    body = f"{name} * w.sum()" if kind == "penalty" else f"{name} * g"
    exec(f"def registry_argument_{name}({first}, *, {name}: float = 2.0):\n    return {body}", space)
    try:
        factory = getattr(fxreg, kind)(space[f"registry_argument_{name}"])
    except fxreg.RuleError as error:
        refusal = str(error)
    else:
        refusal = ""
        effect = factory(1.0, **{name: 3.0}) if kind == "penalty" else factory(**{name: 3.0})
        model, x = net()
        plain = eager(model, x)["first.weight"]
        wanted = torch.full((4, 4), 3.0) if kind == "penalty" else 2 * plain
        torch.testing.assert_close(gradient_from(effect), wanted)
    assert not refusal or repr(name) in refusal


def test_a_random_stream_advances_by_one_in_every_forward_call() -> None:
    @fxreg.gradient
    def registry_streaming(grad: Tensor, weight: Tensor, *, stream: fxreg.Stream) -> Tensor:
        return grad + stream[1].to(grad.dtype)

    model, x = net()
    plain = eager(model, x)["first.weight"]
    gm = fxreg.transform(model, fxreg.Rule(registry_streaming()))
    for step in (1, 2, 3):
        torch.testing.assert_close(eager(gm, x)["first.weight"], plain + step)


def test_a_formula_that_is_no_scalar_is_refused_at_match() -> None:
    @fxreg.penalty
    def registry_vector(weight: Tensor) -> Tensor:
        return weight.abs()

    with pytest.raises(fxreg.RuleError, match=r"'first\.weight'.*\(4, 4\)"):
        fxreg.explain(net()[0], fxreg.Rule(registry_vector(1.0), param="weight"))


def test_a_transform_of_another_shape_is_refused_at_match() -> None:
    @fxreg.gradient
    def registry_summing(grad: Tensor, weight: Tensor) -> Tensor:
        return grad.sum(0)

    with pytest.raises(fxreg.RuleError, match=r"'first\.weight'"):
        fxreg.explain(net()[0], fxreg.Rule(registry_summing(), param="weight"))


def test_a_closed_form_opens_the_way_through_the_gradient() -> None:
    @fxreg.penalty
    def registry_opening(weight: Tensor, *, power: float = 3.0) -> Tensor:
        return weight.abs().pow(power).sum()

    with pytest.raises(fxreg.RuleError, match="has no via='gradient'"):
        fxreg.Rule(registry_opening(1.0), via="gradient")
    wanted = 0.5 * 3 * net()[0].first.weight.square() * net()[0].first.weight.sign()
    torch.testing.assert_close(gradient_from(registry_opening(0.5)), wanted)

    @registry_opening.gradient
    def _(weight: Tensor, *, power: float = 3.0) -> Tensor:
        return power * weight.abs().pow(power - 1) * weight.sign()

    for via in ("penalty", "gradient"):
        torch.testing.assert_close(gradient_from(registry_opening(0.5), via=via), wanted)


@pytest.mark.parametrize("via", ["penalty", "gradient"])
def test_what_a_closed_form_returns_is_written_into_only_where_it_says_so(via: Any) -> None:
    @fxreg.penalty
    def half_of_squares(weight: Tensor) -> Tensor:
        return weight.square().sum() / 2

    @half_of_squares.gradient
    def _(weight: Tensor) -> Tensor:
        return weight  # which is the model's

    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    gm = fxreg.transform(model, fxreg.Rule(half_of_squares(0.5), param="weight", via=via))
    gm(torch.zeros(1, 3)).sum().backward()
    assert torch.equal(model.weight, before)
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad, before / 2)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 4)])
def test_closed_forms_that_say_so_return_a_tensor_of_their_own(shape: tuple[int, ...]) -> None:
    weight, other, number = torch.randn(shape), torch.randn(shape), torch.tensor(1.0)
    given: dict[str, dict[str, Tensor]] = {
        "l1": {},
        "l2": {},
        "elastic_net": {"l1": number, "l2": number},
        "l2_sp": {"anchor": other},
        "ewc": {"anchor": other, "fisher": other},
    }
    forms = {name: getattr(getattr(one, "formula", None), "closed_form", None) for name, one in BUILT_IN.items()}
    assert given.keys() == {name for name, form in forms.items() if hasattr(form, "gives_new")}
    for name, arguments in given.items():
        form: Any = forms[name]
        found = form(weight, **arguments)
        assert found.shape == weight.shape
        assert found.is_contiguous()
        assert not found.numel() or found.data_ptr() not in {one.data_ptr() for one in (weight, other, number)}


def test_where_there_is_a_closed_form_nobody_computes_a_value_that_nobody_asked_for() -> None:
    calls = []

    @fxreg.penalty
    def registry_counted(weight: Tensor) -> Tensor:
        calls.append("value")
        return weight.sum()

    @registry_counted.gradient
    def _(weight: Tensor) -> Tensor:
        calls.append("gradient")
        return torch.ones_like(weight)

    model, x = net()
    gm = fxreg.transform(model, fxreg.Rule(registry_counted(1.0), name="first", param="weight"))
    calls.clear()
    loss = loss_of(gm(x))
    assert calls == []
    loss.backward()
    assert calls == ["gradient"]
    with torch.no_grad():
        gm(x)
    assert calls == ["gradient"]


# Strengths.


def test_every_strength_is_listed_by_its_label() -> None:
    model, _ = net()
    rules = [
        fxreg.Rule(fxreg.l1(0.1)), fxreg.Rule(fxreg.elastic_net(0.2, 0.3), label="net"),
        fxreg.Rule(fxreg.clip_norm(0.4)), fxreg.Rule(registry_huber(0.5, 0.6), via="gradient"),
        fxreg.Rule(fxreg.zero_nans()),
    ]  # fmt: skip
    strengths = fxreg.strengths(fxreg.transform(model, rules))
    assert {name: float(value) for name, value in strengths.items()} == {
        "l1": 0.1, "net.l1": 0.2, "net.l2": 0.3, "clip_norm": 0.4,
        "registry_huber.inner": 0.5, "registry_huber.outer": 0.6,
    }  # fmt: skip
    assert all(value.shape == () and value.dtype == torch.float64 for value in strengths.values())


@pytest.mark.parametrize("emit", ["backward", "output"])
@pytest.mark.parametrize("via", ["penalty", "gradient"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_strength_that_is_set_is_effective_at_the_next_step(emit: Any, via: Any, compiled: bool) -> None:
    torch._dynamo.reset()
    model, x = net()
    plain = eager(model, x)["first.weight"]
    gm = fxreg.transform(model, fxreg.Rule(registry_huber(0.0, 0.0, knee=0.2), via=via), emit=emit)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(gm, backend=counter, fullgraph=True) if compiled else gm
    strengths = fxreg.strengths(gm)
    small = model.first.weight.abs() < 0.2

    def added() -> Tensor:
        output = run(x)
        loss = loss_of(output) if emit == "backward" else loss_of(output[0]) + output[1]
        return torch.autograd.grad(loss, model.first.weight)[0] - plain

    sets: tuple[Callable[[], object], ...] = (
        lambda: strengths.__setitem__("registry_huber.inner", 0.5),
        lambda: strengths["registry_huber.inner"].mul_(2),
        lambda: strengths.__setitem__("registry_huber.outer", torch.tensor(0.25)),
        lambda: strengths["registry_huber.outer"].fill_(0.125),
        lambda: strengths.update({"registry_huber.inner": 3, "registry_huber.outer": 0}),
    )
    wanted = ((0.5, 0.0), (1.0, 0.0), (1.0, 0.25), (1.0, 0.125), (3.0, 0.0))
    added()
    compilations = counter.frame_count
    for change, (inner, outer) in zip(sets, wanted, strict=True):
        change()
        expected_ = torch.where(small, 2 * inner * model.first.weight, outer * model.first.weight.sign())
        torch.testing.assert_close(added(), expected_, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == compilations
    assert compilations == compiled, "the first step compiles once, as the model's own does"


def test_a_strength_changed_between_forward_and_backward_waits_for_the_next_forward() -> None:
    model, x = net()
    plain = eager(model, x)["first.weight"]
    for via in ("penalty", "gradient"):
        gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.5), via=via))
        loss = loss_of(gm(x))
        fxreg.strengths(gm)["l1"] = 8.0
        (found,) = torch.autograd.grad(loss, model.first.weight)
        torch.testing.assert_close(found - plain, 0.5 * model.first.weight.sign())


@pytest.mark.parametrize(
    "value",
    [-1, -0.1, float("nan"), float("inf"), 10**400, True, "1", None, 1j, torch.ones(1), torch.tensor(-1.0),
     torch.tensor(float("nan")), torch.tensor(True), torch.tensor(1.0, device="meta")],
    ids=lambda value: f"{type(value).__name__} {value}"[:24],
)  # fmt: skip
def test_no_strength_is_set_to_what_is_none(value: Any) -> None:
    gm = fxreg.transform(net()[0], fxreg.Rule(fxreg.l1(0.5)))
    with pytest.raises(fxreg.RuleError, match="l1"):
        fxreg.strengths(gm)["l1"] = value
    assert float(fxreg.strengths(gm)["l1"]) == 0.5


def test_strengths_are_a_mapping_of_the_labels_that_are_there() -> None:
    gm = fxreg.transform(net()[0], [fxreg.Rule(fxreg.l1(0.5)), fxreg.Rule(fxreg.elastic_net(0.1, 0.2), label="net")])
    strengths = fxreg.strengths(gm)
    assert list(strengths) == ["l1", "net.l1", "net.l2"]
    assert len(strengths) == 3
    assert "net" not in strengths
    assert strengths.get("net") is None
    for attempt in (
        lambda: strengths["l2"], lambda: strengths.__setitem__("l2", 1.0), lambda: strengths.__delitem__("l1"),
    ):  # fmt: skip
        with pytest.raises(fxreg.FxregError, match=r"l[12]"):
            attempt()


def test_strengths_of_a_copy_are_its_own_and_of_a_compiled_module_the_same() -> None:
    model, _ = net()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.5)))
    for other in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        fxreg.strengths(other)["l1"] = 0.25
        assert float(fxreg.strengths(gm)["l1"]) == 0.5
        assert float(fxreg.strengths(other)["l1"]) == 0.25
    fxreg.strengths(torch.compile(gm, backend="aot_eager"))["l1"] = 0.75
    assert float(fxreg.strengths(gm)["l1"]) == 0.75


def test_two_modules_of_one_model_have_strengths_of_their_own() -> None:
    model, _ = net()
    rule = fxreg.Rule(fxreg.l1(0.5))
    first, second = fxreg.transform(model, rule), fxreg.transform(model, rule)
    fxreg.strengths(first)["l1"] = 0.0
    assert float(fxreg.strengths(second)["l1"]) == 0.5


def test_an_effect_is_shown_as_it_is_mostly_written() -> None:
    assert repr(fxreg.group_lasso(0.1, dim=(0,))) == "group_lasso(0.1, dim=0, size=1)"
    assert repr(fxreg.group_lasso(0.1, dim=(0, 1), size=(2, 4))) == "group_lasso(0.1, dim=(0, 1), size=(2, 4))"
    assert repr(fxreg.group_lasso) == "<fxreg effect group_lasso(strength, dim=0, size=1)>"
    with pytest.raises(fxreg.RuleError, match=r"^group_lasso\(strength, dim=0, size=1\): got an unexpected"):
        fxreg.group_lasso(0.1, axis=0)  # type: ignore[call-arg]
