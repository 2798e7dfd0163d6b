"""`verify` accepts what `transform` emits, and rejects every corruption of it."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import fxreg
from fxreg import calls, operators
from fxreg.module import state_of

from .models import CASES, build

RULES = [
    fxreg.Rule(fxreg.l1(0.05), param="weight", label="sparse"),
    fxreg.Rule(fxreg.l2(0.3), param="weight", label="small"),
    fxreg.Rule(fxreg.clip_norm(0.02), name="head", label="clip"),
    fxreg.Rule(fxreg.scale(0.5), name="head", label="half"),
    fxreg.Rule(fxreg.elastic_net(0.1, 0.2), name="norm", via="gradient", label="elastic"),
]


class Net(nn.Module):
    """Two outputs, batch norm, dropout by the root's flag, a head that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        h = self.norm(torch.tanh(self.body(x)))
        h = torch.nn.functional.dropout(h, 0.3, self.training)
        return self.head(torch.tanh(self.head(h))), {"hidden": h}


def emitted(emit: str = "backward") -> tuple[nn.Module, torch.fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(5, 4)
    return model, fxreg.transform(model, RULES, emit=emit), x  # type: ignore[arg-type]


def node(gm: fx.GraphModule, target: object, index: int = 0) -> fx.Node:
    return [n for n in gm.graph.nodes if n.target == target][index]


def operator(gm: fx.GraphModule, name: str, index: int = 0) -> fx.Node:
    return [n for n in gm.graph.nodes if str(n.target).startswith(f"fxreg.{name}.")][index]


def output(gm: fx.GraphModule) -> fx.Node:
    return next(iter(reversed(gm.graph.nodes)))


def attach(gm: fx.GraphModule) -> fx.Node:
    return node(gm, calls.attach)


def around(gm: fx.GraphModule, inner: fx.Node, function: Callable[..., object], *args: object) -> None:
    """Put a call around a node, for all its users."""
    with gm.graph.inserting_after(inner):
        outer = gm.graph.call_function(function, (inner, *args))
    inner.replace_all_uses_with(outer, delete_user_cb=lambda user: user is not outer)


def the_attachment_is_dropped(gm: fx.GraphModule) -> None:
    attach(gm).replace_all_uses_with(attach(gm).args[0])  # type: ignore[arg-type]


def the_attachment_is_made_twice(gm: fx.GraphModule) -> None:
    first = attach(gm)
    with gm.graph.inserting_after(first):
        second = gm.graph.call_function(calls.attach, (first, *first.args[1:]))
    first.replace_all_uses_with(second, delete_user_cb=lambda user: user is not second)


def only_the_first_output_is_attached(gm: fx.GraphModule) -> None:
    first = attach(gm)
    pair = first.args[0]
    with gm.graph.inserting_before(first):
        one = gm.graph.call_function(calls.attach, (pair[0], *first.args[1:]))  # type: ignore[index]
    output(gm).args = ((one, pair[1]),)  # type: ignore[index]


def a_penalty_is_left_out(gm: fx.GraphModule) -> None:
    attach(gm).update_arg(1, list(attach(gm).args[1])[:-1])  # type: ignore[arg-type]


def a_penalty_is_attached_twice(gm: fx.GraphModule) -> None:
    terms = list(attach(gm).args[1])  # type: ignore[arg-type]
    attach(gm).update_arg(1, [*terms, terms[0]])


def a_penalty_reads_another_weight(gm: fx.GraphModule) -> None:
    reads = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target == "body.weight"]
    for read in reads:
        if any(str(user.target).startswith("fxreg.") for user in read.users):
            read.target = "head.weight"


def a_penalty_is_another_one(gm: fx.GraphModule) -> None:
    operator(gm, "l1").target = operator(gm, "l2").target


def strengths_are_swapped(gm: fx.GraphModule) -> None:
    sparse, small = node(gm, "fxreg.sparse"), node(gm, "fxreg.small")
    sparse.target, small.target = small.target, sparse.target


def the_loss_scale_is_a_strength(gm: fx.GraphModule) -> None:
    attach(gm).update_arg(2, node(gm, "fxreg.sparse"))


def a_penalty_reads_a_detached_weight(gm: fx.GraphModule) -> None:
    penalty = operator(gm, "l2")
    with gm.graph.inserting_before(penalty):
        detached = gm.graph.call_method("detach", (penalty.args[0],))
    penalty.update_arg(0, detached)


def a_transform_is_bypassed(gm: fx.GraphModule) -> None:
    clip = operator(gm, "clip_norm")
    clip.replace_all_uses_with(clip.args[0])  # type: ignore[arg-type]


def a_transform_misses_one_use(gm: fx.GraphModule) -> None:
    call = [n for n in gm.graph.nodes if n.target is calls.call_with and n.args[0].target == "head"][1]  # type: ignore[union-attr]
    raw = {}
    with gm.graph.inserting_before(call):
        for name in call.args[1]:  # type: ignore[union-attr]
            raw[name] = gm.graph.get_attr(f"head.{name}")
    call.update_arg(1, raw)


def transforms_are_in_the_wrong_order(gm: fx.GraphModule) -> None:
    for index in (0, 1):
        clip, half = operator(gm, "clip_norm", index), operator(gm, "scale", index)
        clip.target, half.target = half.target, clip.target
        rest = clip.args[1:], half.args[1:]
        clip.args, half.args = (clip.args[0], *rest[1]), (half.args[0], *rest[0])


def a_transform_acts_twice(gm: fx.GraphModule) -> None:
    half = operator(gm, "scale")
    with gm.graph.inserting_after(half):
        again = gm.graph.call_function(half.target, (half, *half.args[1:]))  # type: ignore[arg-type]
    half.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)


def a_penalty_at_the_parameter_is_bypassed(gm: fx.GraphModule) -> None:
    elastic = operator(gm, "elastic_net_gradient")
    elastic.replace_all_uses_with(elastic.args[0])  # type: ignore[arg-type]


def the_training_flag_is_baked_in(gm: fx.GraphModule) -> None:
    dropout = node(gm, torch.nn.functional.dropout)
    dropout.kwargs = {**dropout.kwargs, "training": True}


def dropout_drops_more(gm: fx.GraphModule) -> None:
    dropout = node(gm, torch.nn.functional.dropout)
    dropout.kwargs = {**dropout.kwargs, "p": 0.31}


def batch_norm_runs_twice(gm: fx.GraphModule) -> None:
    norm = next(n for n in gm.graph.nodes if n.target is calls.call_with and n.args[0].target == "norm")
    with gm.graph.inserting_after(norm):
        gm.graph.call_module("norm", norm.args[2])  # type: ignore[arg-type]


def an_output_is_a_hair_off(gm: fx.GraphModule) -> None:
    around(gm, node(gm, torch.nn.functional.dropout), torch.mul, 1 + 2.0**-20)


def an_output_is_detached(gm: fx.GraphModule) -> None:
    around(gm, node(gm, torch.tanh), torch.detach)


def outputs_change_places(gm: fx.GraphModule) -> None:
    first = attach(gm)
    pair = first.args[0]
    first.update_arg(0, (pair[1]["hidden"], {"hidden": pair[0]}))  # type: ignore[index, call-overload]


def the_structure_changes(gm: fx.GraphModule) -> None:
    first = attach(gm)
    pair = first.args[0]
    first.update_arg(0, [pair[0], pair[1]])  # type: ignore[index]


def a_gradient_is_scaled(gm: fx.GraphModule) -> None:
    read = operator(gm, "scale").args[0]
    around(gm, read, torch.mul, 1.0)  # type: ignore[arg-type]
    next(iter(reversed(list(read.users)))).update_arg(1, 1.001)  # type: ignore[union-attr]


MUTANTS = (
    the_attachment_is_dropped, the_attachment_is_made_twice, only_the_first_output_is_attached, a_penalty_is_left_out,
    a_penalty_is_attached_twice, a_penalty_reads_another_weight, a_penalty_is_another_one, strengths_are_swapped,
    the_loss_scale_is_a_strength, a_penalty_reads_a_detached_weight, a_transform_is_bypassed,
    a_transform_misses_one_use, transforms_are_in_the_wrong_order, a_transform_acts_twice,
    a_penalty_at_the_parameter_is_bypassed, the_training_flag_is_baked_in, dropout_drops_more, batch_norm_runs_twice,
    an_output_is_a_hair_off, an_output_is_detached, outputs_change_places, the_structure_changes, a_gradient_is_scaled,
)  # fmt: skip


@pytest.mark.parametrize("corrupt", MUTANTS)
def test_a_corrupted_graph_is_rejected(corrupt: Callable[[fx.GraphModule], None]) -> None:
    model, gm, x = emitted()
    fxreg.verify(gm, model, (x,))
    corrupt(gm)
    gm.recompile()
    with pytest.raises(fxreg.VerifyError):
        fxreg.verify(gm, model, (x,))


def the_penalty_is_doubled(gm: fx.GraphModule) -> None:
    around(gm, node(gm, operators.total), torch.mul, 2.0)


def the_penalty_is_detached(gm: fx.GraphModule) -> None:
    around(gm, node(gm, operators.total), torch.detach)


def a_term_is_missing(gm: fx.GraphModule) -> None:
    total = node(gm, operators.total)
    total.update_arg(0, list(total.args[0])[1:])  # type: ignore[arg-type]


@pytest.mark.parametrize("corrupt", [the_penalty_is_doubled, the_penalty_is_detached, a_term_is_missing])
@pytest.mark.parametrize("emit", ["output", "loss"])
def test_a_corrupted_value_is_rejected(emit: str, corrupt: Callable[[fx.GraphModule], None]) -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.net(x).square().mean()}

    torch.manual_seed(0)
    model, x = WithLoss(), torch.randn(5, 4)
    rules = [fxreg.Rule(fxreg.l1(0.05)), fxreg.Rule(fxreg.l2(0.1))]
    gm = fxreg.transform(model, rules, emit=emit)  # type: ignore[arg-type]
    fxreg.verify(gm, model, (x,))
    corrupt(gm)
    gm.recompile()
    with pytest.raises(fxreg.VerifyError):
        fxreg.verify(gm, model, (x,))


def test_the_penalty_added_outside_training_is_rejected() -> None:
    model = nn.Linear(4, 1)

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).square().mean()

    whole = Mean()
    gm = fxreg.transform(whole, [fxreg.Rule(fxreg.l1(0.5))], emit="loss")
    node(gm, calls.add_to_loss).update_arg(2, True)
    gm.recompile()
    with pytest.raises(fxreg.VerifyError, match="eval"):
        fxreg.verify(gm, whole, (torch.randn(3, 4),))


def test_a_wrong_closed_form_is_rejected() -> None:
    @fxreg.penalty
    def wrong_cube(weight: Tensor) -> Tensor:
        return weight.abs().pow(3).sum()

    @wrong_cube.gradient
    def _(weight: Tensor) -> Tensor:
        return 3 * weight.abs() * weight * 1.01

    model = nn.Linear(3, 2)
    for via in ("penalty", "gradient"):
        with pytest.raises(fxreg.VerifyError, match="gradient of 'weight'"):
            fxreg.transform(model, fxreg.Rule(wrong_cube(0.1), via=via), example_inputs=(torch.randn(2, 3),))


def test_another_model_is_rejected() -> None:
    model, gm, x = emitted()
    with pytest.raises(fxreg.VerifyError, match="not the model's own tensor"):
        fxreg.verify(gm, copy.deepcopy(model), (x,))
    with pytest.raises(fxreg.VerifyError, match="by name and order"):
        fxreg.verify(gm, nn.Linear(4, 2), (x,))


@pytest.mark.parametrize("emit", ["backward", "output"])
@pytest.mark.parametrize("model", CASES)
def test_what_is_emitted_is_accepted_and_said_to_be_verified(model: str, emit: str) -> None:
    original, inputs = build(model)
    rules = [fxreg.Rule(fxreg.l1(0.1)), fxreg.Rule(fxreg.clip_value(0.01))]
    gm = fxreg.transform(original, rules, example_inputs=inputs, emit=emit)  # type: ignore[arg-type]
    assert fxreg.explain(gm).verified
    assert "not verified" in str(fxreg.explain(fxreg.transform(original, rules)))


def test_a_compiled_model_is_the_model() -> None:
    model, gm, x = emitted()
    fxreg.verify(gm, torch.compile(model), (x,))  # type: ignore[arg-type]
    with torch.no_grad():
        other = copy.deepcopy(model)
        other.head.weight.add_(1.0)
    with pytest.raises(fxreg.VerifyError):
        fxreg.verify(gm, torch.compile(other), (x,))  # type: ignore[arg-type]


def test_verification_leaves_no_trace() -> None:
    model, gm, x = emitted()
    model.head.eval()
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    generator = torch.get_rng_state()
    fxreg.verify(gm, model, (x,))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())  # type: ignore[arg-type]
    assert model.training
    assert not model.head.training


class Overwriting(nn.Module):
    """Writes, in evaluation, into what its gradient needs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.body(x))
        if not self.training:
            y.mul_(2)
        return y


def test_a_mode_without_a_gradient_is_verified_as_far_as_it_goes() -> None:
    model, x = Overwriting(), torch.randn(2, 4)
    gm = fxreg.transform(model, RULES[0], example_inputs=(x,))
    assert fxreg.explain(gm).verified
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gm.eval()(x).sum().backward()


def test_a_gradient_where_the_model_has_none_is_rejected() -> None:
    x = torch.randn(2, 4)
    model = Overwriting()
    gm = fxreg.transform(model, RULES[0], example_inputs=(x,))
    evaluation = state_of(gm).others[0]
    (written,) = (one for one in evaluation.graph.nodes if one.target == "mul_")
    written.target = "mul"
    evaluation.recompile()
    with pytest.raises(fxreg.VerifyError, match="the emitted module does not fail"):
        fxreg.verify(gm, model, (x,))


def test_another_gradient_at_an_input_is_rejected() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + x

    x = torch.randn(2, 4, requires_grad=True)
    model = Detached()
    gm = fxreg.transform(model, RULES[0], example_inputs=(x,))
    assert fxreg.explain(gm).verified
    assert x.grad is None
    last = next(one for one in gm.graph.nodes if one.op == "call_function" and "add" in one.name)
    with gm.graph.inserting_before(last):
        last.replace_input_with(last.args[1], gm.graph.call_method("detach", (last.args[1],)))
    gm.recompile()
    with pytest.raises(fxreg.VerifyError, match="input 0"):
        fxreg.verify(gm, model, (x,))


@pytest.mark.parametrize("rule", [fxreg.Rule(fxreg.l1(0.01)), fxreg.Rule(fxreg.scale(0.5))])
@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_compared_as_dense_ones(layer: type[nn.Module], rule: fxreg.Rule) -> None:
    kwargs = {"mode": "sum"} if layer is nn.EmbeddingBag else {}
    model = nn.Sequential(layer(5, 3, sparse=True, **kwargs), nn.Linear(3, 2))
    gm = fxreg.transform(model, rule, example_inputs=(torch.tensor([[0, 1], [3, 3]]),))
    assert fxreg.explain(gm).verified


@pytest.mark.parametrize("rule", [fxreg.Rule(fxreg.l1(0.1), via=via) for via in ("penalty", "gradient")])
def test_a_parameter_that_is_one_number_is_no_other(rule: fxreg.Rule) -> None:
    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(-0.3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain

    fxreg.transform(Gained(), rule, example_inputs=(torch.ones(3),))


class Zeros(nn.Module):
    """Much has no gradient at first: a bias, a penalty at its anchor, and what lies before weights of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x))


@pytest.mark.parametrize(
    ("rule", "emit"),
    [
        (fxreg.Rule(fxreg.l1(0.1), name="down", param="bias"), "backward"),
        (fxreg.Rule(fxreg.l2(0.1), name="up", param="weight"), "output"),
        (fxreg.Rule(fxreg.l2(0.1), name="up", param="weight", via="gradient"), "backward"),
        (fxreg.Rule(fxreg.l2_sp(0.1), param="weight"), "backward"),
        (fxreg.Rule(fxreg.scale(0.5), name="down", param="weight"), "backward"),
    ],
    ids=["bias", "value", "gradient", "anchor", "transform"],
)
def test_a_penalty_or_transform_without_a_gradient_yet_is_looked_at_elsewhere(rule: fxreg.Rule, emit: str) -> None:
    torch.manual_seed(0)
    model, x = Zeros(), torch.randn(3, 4)
    before = copy.deepcopy(model.state_dict())
    gm = fxreg.transform(model, rule, example_inputs=(x,), emit=emit)  # type: ignore[arg-type]
    name = rule.effect.name + "_gradient" * (rule.via == "gradient")
    inserted = operator(gm, name)
    if rule.lowering == "penalty":
        around(gm, inserted, torch.mul, 2.0)
    else:
        inserted.replace_all_uses_with(inserted.args[0])  # type: ignore[arg-type]
    gm.recompile()
    recorded, versions = model(x).sum(), [p._version for p in model.parameters()]
    with pytest.raises(fxreg.VerifyError):
        fxreg.verify(gm, model, (x,))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert [p._version for p in model.parameters()] == versions
    recorded.backward()


def test_an_emitted_module_that_raises_where_the_model_does_not_is_rejected() -> None:
    model, gm, x = emitted()
    around(gm, operator(gm, "l1"), torch.Tensor.expand, 3, 3)
    gm.recompile()
    with pytest.raises(fxreg.VerifyError, match=r"in train mode.* the emitted module raises RuntimeError, and"):
        fxreg.verify(gm, model, (x,))
    with pytest.raises(RuntimeError, match="shapes"):
        fxreg.verify(gm, model, (x[:, 1:],))


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_that_is_compiled_verifies(inside: bool) -> None:
    model: nn.Module = torch.compile(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1)), backend="aot_eager")
    model = nn.Sequential(model, nn.Linear(1, 1)) if inside else model
    x = torch.randn(2, 3)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.1)), example_inputs=(x,))
    assert fxreg.explain(gm).verified
    torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)
