"""Lints: found where they are to be, silent elsewhere, and what they say is so: it is tried on the model itself."""

import copy
import io
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxreg
from tests.models import build

L2 = fxreg.Rule(fxreg.l2(0.1), param="*weight")


class Calls(nn.Module):
    """A model whose forward is a function of itself and its input."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **members: Any) -> None:
        super().__init__()
        self.call = forward
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def found(model: Any, kind: str, *rules: fxreg.Rule, **kwargs: Any) -> set[str]:
    """The sites of the lints of a kind, of an emitted module."""
    gm = fxreg.transform(model, rules or [L2], **kwargs)
    return {site for lint in fxreg.explain(gm).lints if lint.kind == kind for site in lint.sites}


# Scale-invariant weights. Each model has its layer at `lin`, and its weight (and, if said, bias) is scaled.

W, B = "lin.weight", "lin.bias"
IMAGE, ROWS, SEQUENCE = (6, 3, 5, 5), (6, 4), (6, 7, 4)
INVARIANT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "conv, batch norm": (
        lambda: Calls(lambda m, x: m.bn(m.lin(x)).relu(), lin=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)),
        IMAGE,
        {W},
    ),
    "transposed conv, instance norm": (
        lambda: Calls(lambda m, x: m.norm(m.lin(x)), lin=nn.ConvTranspose2d(3, 4, 3), norm=nn.InstanceNorm2d(4)),
        IMAGE,
        {W},
    ),
    "linear, batch norm over rows": (
        lambda: Calls(lambda m, x: m.bn(m.lin(x).reshape(-1, 8)), lin=nn.Linear(4, 8), bn=nn.BatchNorm1d(8)),
        SEQUENCE,
        {W},
    ),
    "linear, identity, transposed, batch norm": (
        lambda: Calls(
            lambda m, x: m.bn(m.same(m.lin(x)).transpose(1, 2)),
            lin=nn.Linear(4, 8), bn=nn.BatchNorm1d(8), same=nn.Identity(),
        ),
        SEQUENCE,
        {W},
    ),
    "conv without a bias, flattened, layer norm": (
        lambda: Calls(
            lambda m, x: m.norm(m.lin(x).flatten(1)), lin=nn.Conv2d(3, 4, 3, bias=False), norm=nn.LayerNorm(36)
        ),
        IMAGE,
        {W},
    ),
    "linear without a bias, RMS norm": (
        lambda: Calls(lambda m, x: m.norm(m.lin(x)), lin=nn.Linear(4, 8, bias=False), norm=nn.RMSNorm(8)),
        ROWS,
        {W},
    ),
    "linear with its bias, layer norm": (
        lambda: Calls(lambda m, x: m.norm(m.lin(x)), lin=nn.Linear(4, 8), norm=nn.LayerNorm(8)),
        ROWS,
        {W, B},
    ),
    "conv with its bias, group norm": (
        lambda: Calls(lambda m, x: m.norm(m.lin(x)), lin=nn.Conv2d(3, 4, 3), norm=nn.GroupNorm(2, 4)),
        IMAGE,
        {W, B},
    ),
    "conv, group norm of single channels": (
        lambda: Calls(lambda m, x: m.norm(m.lin(x)), lin=nn.Conv2d(3, 4, 3), norm=nn.GroupNorm(4, 4)),
        IMAGE,
        {W},
    ),
    "embedding, layer norm": (
        lambda: Calls(
            lambda m, x: m.norm(m.lin(x.argmax(1))), lin=nn.Embedding(4, 8), norm=nn.LayerNorm(8)
        ),
        ROWS,
        {W},
    ),
    "two normalizations": (
        lambda: Calls(
            lambda m, x: m.norm(y := m.lin(x)) + m.bn(y),
            lin=nn.Linear(4, 8),
            norm=nn.LayerNorm(8),
            bn=nn.BatchNorm1d(8),
        ),
        ROWS,
        {W, B},
    ),
    "called twice": (
        lambda: Calls(lambda m, x: m.bn(m.lin(m.bn(m.lin(x)))), lin=nn.Linear(4, 4), bn=nn.BatchNorm1d(4)),
        ROWS,
        {W},
    ),
    "its size is asked for": (
        lambda: Calls(
            lambda m, x: m.norm(y := m.lin(x)) * y.size(0) * y.shape[1], lin=nn.Linear(4, 8, bias=False),
            norm=nn.LayerNorm(8),
        ),
        ROWS,
        {W},
    ),
    "functions, layer norm": (
        lambda: Calls(
            lambda m, x: F.layer_norm(F.linear(x, m.lin.weight, m.lin.bias), (8,), m.gain), lin=nn.Linear(4, 8),
            gain=nn.Parameter(torch.ones(8)),
        ),
        ROWS,
        {W, B},
    ),
    "functions, normalize": (
        lambda: Calls(
            lambda m, x: F.normalize(F.conv2d(x, m.lin.weight), dim=1), lin=nn.Conv2d(3, 4, 3, bias=False)
        ),
        IMAGE,
        {W},
    ),
    "functions, RMS norm": (
        lambda: Calls(lambda m, x: F.rms_norm(m.lin(x), (8,)), lin=nn.Linear(4, 8, bias=False)),
        ROWS,
        {W},
    ),
    "functions, batch norm": (
        lambda: Calls(
            lambda m, x: F.batch_norm(
                m.lin(x), m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias, m.training
            ),
            lin=nn.Linear(4, 8), bn=nn.BatchNorm1d(8),
        ),
        ROWS,
        {W},
    ),
    "functions, group norm": (
        lambda: Calls(
            lambda m, x: F.group_norm(m.lin(x), 4, m.gain), lin=nn.Conv2d(3, 4, 3), gain=nn.Parameter(torch.ones(4))
        ),
        IMAGE,
        {W},
    ),
    "functions, instance norm": (
        lambda: Calls(lambda m, x: F.instance_norm(m.lin(x)), lin=nn.Conv2d(3, 4, 3, bias=False)),
        IMAGE,
        {W},
    ),
}  # fmt: skip


def distance_when_scaled(model: nn.Module, x: Tensor, names: set[str], factor: float = 3.0) -> float:
    """How far the output in train mode moves when parameters are scaled, relative to it."""
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            scaled.get_parameter(name).mul_(factor)
        before, after = model(x), scaled(x)
    return float((before - after).norm() / before.norm())


@pytest.mark.parametrize("recorded", [False, True], ids=["traced", "recorded"])
@pytest.mark.parametrize("case", INVARIANT)
def test_weights_whose_scale_a_normalization_takes_out(case: str, recorded: bool) -> None:
    make, shape, names = INVARIANT[case]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    assert distance_when_scaled(model, x, names) < 1e-3  # the eps of normalizations
    if recorded:  # a forward that no trace goes through
        call = model.call
        model.call = lambda m, x: call(m, x) if x.sum() < 1e9 else x
    rules = [L2, fxreg.Rule(fxreg.l1(0.1), param="bias", optional=True)] if B in names else [L2]
    gm = fxreg.transform(model, rules, example_inputs=(x,) if recorded else None)
    (lint,) = (lint for lint in fxreg.explain(gm).lints if lint.kind == "scale-invariant" and lint.labels == ("l2",))
    assert lint.sites == (W,)
    assert f"rule 'l2' penalizes the size of weights{' and biases' if B in names else ''} whose scale" in lint.message
    if B in names:
        assert distance_when_scaled(model, x, {W}) > 0.01
        assert found(model, "scale-invariant", L2) == set()  # the bias is not penalized, so the weight cannot shrink


VARYING: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a nonlinearity between": (
        lambda: Calls(lambda m, x: m.norm(m.lin(x).tanh()), lin=nn.Linear(4, 8, bias=False), norm=nn.LayerNorm(8)),
        ROWS,
    ),
    "also used elsewhere": (
        lambda: Calls(lambda m, x: m.norm(y := m.lin(x)) + y, lin=nn.Linear(4, 8, bias=False), norm=nn.LayerNorm(8)),
        ROWS,
    ),
    "also returned, in another shape": (
        lambda: Calls(
            lambda m, x: torch.cat([m.norm(y := m.lin(x)).flatten(), y.flatten()]), lin=nn.Linear(4, 8, bias=False),
            norm=nn.LayerNorm(8),
        ),
        ROWS,
    ),
    "a residual": (
        lambda: Calls(lambda m, x: m.norm(x + m.lin(x)), lin=nn.Linear(4, 4, bias=False), norm=nn.LayerNorm(4)),
        ROWS,
    ),
    "only one of two calls": (
        lambda: Calls(lambda m, x: m.lin(m.norm(m.lin(x))), lin=nn.Linear(4, 4, bias=False), norm=nn.LayerNorm(4)),
        ROWS,
    ),
    "the weight is read elsewhere": (
        lambda: Calls(
            lambda m, x: m.norm(m.lin(x)) + m.lin.weight.sum(), lin=nn.Linear(4, 4, bias=False), norm=nn.LayerNorm(4)
        ),
        ROWS,
    ),
    "a tied weight": (
        lambda: tied(
            Calls(
                lambda m, x: m.other(m.norm(m.lin(x))), lin=nn.Linear(4, 4, bias=False),
                other=nn.Linear(4, 4, bias=False), norm=nn.LayerNorm(4),
            )
        ),
        ROWS,
    ),
    "a bias that the normalization keeps": (
        lambda: Calls(lambda m, x: m.norm(m.lin(x)), lin=nn.Conv2d(3, 4, 3), norm=nn.GroupNorm(2, 4)),
        IMAGE,
    ),
    "a bias along another dimension": (
        lambda: Calls(lambda m, x: m.bn(m.lin(x)), lin=nn.Linear(4, 8), bn=nn.BatchNorm1d(7)),
        SEQUENCE,
    ),
    "a normalization set to evaluation": (
        lambda: Calls(lambda m, x: m.bn(m.lin(x)), lin=nn.Linear(4, 8), bn=nn.BatchNorm1d(8).eval()),
        ROWS,
    ),
    "a batch norm that never trains": (
        lambda: Calls(
            lambda m, x: F.batch_norm(m.lin(x), m.bn.running_mean, m.bn.running_var), lin=nn.Linear(4, 8),
            bn=nn.BatchNorm1d(8),
        ),
        ROWS,
    ),
    "a normalization by what was computed": (
        lambda: Calls(
            lambda m, x: F.layer_norm(x, (4,), F.linear(x[:1], m.lin.weight)[0]), lin=nn.Linear(4, 4, bias=False)
        ),
        ROWS,
    ),
    "a normalization scaled by what it is of": (
        lambda: Calls(lambda m, x: F.layer_norm(y := m.lin(x), (4,), y), lin=nn.Linear(4, 4, bias=False)),
        (4,),
    ),
    "a hooked layer": (
        lambda: hooked(
            Calls(lambda m, x: m.norm(m.lin(x)), lin=nn.Linear(4, 8, bias=False), norm=nn.LayerNorm(8))
        ),
        ROWS,
    ),
    "a layer of somebody's own": (
        lambda: Calls(lambda m, x: m.norm(m.lin(x)), lin=Shifted(4, 8, bias=False), norm=nn.LayerNorm(8)),
        ROWS,
    ),
}  # fmt: skip


class Shifted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).cumsum(-1) + x.sum(-1, keepdim=True) * torch.arange(8)


def tied(model: Any) -> nn.Module:
    model.other.weight = model.lin.weight
    return model


def hooked(model: Any) -> nn.Module:
    model.lin.register_forward_hook(
        lambda module, args, output: output.cumsum(-1) + args[0].sum(-1, keepdim=True).sin() * torch.arange(8)
    )
    return model


@pytest.mark.parametrize("case", VARYING)
def test_weights_whose_scale_matters(case: str) -> None:
    make, shape = VARYING[case]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    assert found(model, "scale-invariant") == set()
    assert distance_when_scaled(model, x, {W}) > 0.01


def test_exported_programs_show_scale_invariance_in_their_operators() -> None:
    model = Calls(
        lambda m, x: m.norm(m.fc(m.bn(m.lin(x)).flatten(1))), lin=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4),
        fc=nn.Linear(36, 5, bias=False), norm=nn.LayerNorm(5),
    )  # fmt: skip
    x = (torch.randn(IMAGE),)
    assert found(torch.export.export(model, x), "scale-invariant") == {W, "fc.weight"}
    assert found(torch.export.export(model.eval(), x), "scale-invariant") == {"fc.weight"}


def test_only_what_happens_in_train_mode_matters() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.lin(x)) if m.training else m.lin(x)

    model = Calls(forward, lin=nn.Linear(4, 8, bias=False), norm=nn.LayerNorm(8))
    assert found(model, "scale-invariant", example_inputs=(torch.randn(ROWS),)) == {W}
    assert found(model, "scale-invariant") == set()  # it is one opaque call


@pytest.mark.parametrize(
    ("effect", "is_norm"),
    [
        (fxreg.l1(0.1), True),
        (fxreg.elastic_net(0.1, 0.1), True),
        (fxreg.group_lasso(0.1), True),
        (fxreg.nuclear_norm(0.1), True),
        (fxreg.spectral(0.1), True),
        (fxreg.smooth_l1(0.1), True),
        (fxreg.log_sum(0.1), True),
        (fxreg.scad(0.1), True),
        (fxreg.mcp(0.1), True),
        (fxreg.orthogonal(0.1), False),
        (fxreg.clip_norm(1.0), False),
    ],
)
def test_only_norms_are_pointless_there(effect: Any, is_norm: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    assert found(model, "scale-invariant", fxreg.Rule(effect, layer="Linear", param="weight")) == (
        {"0.weight"} if is_norm else set()
    )


def test_a_batch_norm_counts_by_the_mode_it_has_beside_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).eval()
    assert found(model, "scale-invariant") == {"0.weight"}  # all of it will be set to training
    model[1].train()
    assert found(model, "scale-invariant") == {"0.weight"}


# Unreached.


def test_parameters_that_no_output_depends_on() -> None:
    model = Calls(
        lambda m, x: (m.dropped(x), m.lin(x) + m.cut(x).detach() + m.measured(x).size(0))[1],
        lin=nn.Linear(4, 4), dropped=nn.Linear(4, 4), cut=nn.Linear(4, 4), unused=nn.Linear(4, 4),
        measured=nn.Linear(4, 4), gain=nn.Parameter(torch.ones(4)),
    )  # fmt: skip
    rule = fxreg.Rule(fxreg.l1(0.1))
    assert found(model, "scale-invariant", rule) == set()
    expected = {f"{path}.{key}" for path in ("dropped", "cut", "unused", "measured") for key in ("weight", "bias")}
    assert found(model, "unreached", rule) == expected | {"gain"}
    model(torch.randn(2, 4)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == expected | {"gain"}


@pytest.mark.parametrize("recorded", [False, True], ids=["traced", "recorded"])
def test_what_is_written_in_place_is_used(recorded: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y.add_(m.lin(x))
        y[:, :2] = m.small(x)
        y += m.more(x)
        return y if not recorded or x.sum() < 1e9 else x

    model = Calls(forward, lin=nn.Linear(4, 4), small=nn.Linear(4, 2), more=nn.Linear(4, 4))
    inputs = (torch.randn(2, 4),) if recorded else None
    assert found(model, "unreached", fxreg.Rule(fxreg.l1(0.1)), example_inputs=inputs) == set()


def test_what_is_called_as_a_whole_counts_as_reached() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x) if x.sum() > 0 else x

    rule = fxreg.Rule(fxreg.l1(0.1))
    assert found(Gate(), "unreached", rule) == set()
    assert (
        found(Calls(lambda m, x: (m.gate(m.lin(x)), x)[1], lin=nn.Linear(4, 4), gate=Gate()), "unreached", rule)
        == set()
    )
    assert found(Gate(), "unreached", rule, example_inputs=(torch.ones(2, 4),)) == {"unused.weight", "unused.bias"}


def test_only_penalties_on_trainable_parameters_are_told_of() -> None:
    model = Calls(lambda m, x: m.lin(x), lin=nn.Linear(4, 4), unused=nn.Linear(4, 4), frozen=nn.Linear(4, 4))
    model.frozen.requires_grad_(False)
    rules = [fxreg.Rule(fxreg.clip_norm(1.0)), fxreg.Rule(fxreg.weight_decay(0.1), param="weight")]
    assert found(model, "unreached", *rules) == {"unused.weight"}


# Biases and normalizations.

MIXED = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LSTM(8, 3))
BIASES, NORM = {"0.bias", "2.bias_ih_l0", "2.bias_hh_l0"}, {"1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, BIASES | NORM),
        ({"param": "weight"}, {"1.weight"}),
        ({"param": "re:.*"}, BIASES | NORM),
        ({"param": "*bias*"}, set()),
        ({"layer": "Linear"}, {"0.bias"}),
        ({"layer": ("Linear", "BatchNorm1d")}, {"0.bias"}),
        ({"layer": nn.Module}, BIASES | NORM),
        ({"name": "1"}, set()),
        ({"name": "[01]"}, {"0.bias"} | NORM),
        ({"exclude": ("*bias*", "1.*")}, set()),
        ({"where": lambda site: len(site.shape) == 1}, set()),
    ],
)
def test_biases_and_normalizations_that_nobody_named(keys: dict[str, Any], expected: set[str]) -> None:
    for effect in (fxreg.l1(0.1), fxreg.l2(0.1), fxreg.weight_decay(0.1)):
        lints = fxreg.explain(MIXED, fxreg.Rule(effect, **keys)).lints
        assert {site for lint in lints for site in lint.sites} == expected
        assert {lint.kind for lint in lints} <= {"bias-or-norm"}


def test_normalizations_are_known_by_their_names_as_well() -> None:
    class LlamaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    (lint,) = fxreg.explain(nn.Sequential(LlamaRMSNorm(), nn.Linear(4, 4)), L2).lints
    assert lint.sites == ("0.weight",)


def test_other_effects_may_be_anywhere() -> None:
    rules = [
        fxreg.Rule(effect) for effect in (fxreg.clip_norm(1.0), fxreg.entropy(0.1), fxreg.max_norm(0.1, limit=2.0))
    ]
    assert fxreg.explain(nn.Linear(2, 2), rules).lints == ()


def test_relative_position_tables_are_no_biases() -> None:
    model = nn.Module()
    model.bias_table = nn.Parameter(torch.ones(3, 3))
    assert fxreg.explain(model, fxreg.Rule(fxreg.l1(0.1))).lints == ()


# Exclusions that leave out nothing.

HEADED = nn.Sequential(OrderedDict(body=nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), head=nn.Linear(4, 2)))


@pytest.mark.parametrize(
    ("exclude", "meant"),
    [
        ("head", "'head.*'"),
        ("bo*y", "'bo*y.*'"),
        ("*head", "'*head.*'"),
        ("bias", "'*.bias'"),
        ("0.weight", "'*.0.weight'"),
        ("ead.w", "'*ead.w*'"),
        ("head.wieght", "Mend it"),
        ("haed.*", "Mend it"),
        ("", "Mend it"),
        (re.compile("head"), "'re:head[.].*'"),
        ("*.gain", None),  # made for models that have one
        (re.compile(".*gain"), None),
        ("head.*", None),
        ("*.bias", None),  # nothing that the rule would take, and yet no mistake
    ],
)
def test_exclusions_that_name_nothing(exclude: Any, meant: str | None) -> None:
    rule = fxreg.Rule(fxreg.clip_norm(1.0), param="weight", exclude=[exclude, "*.1.weight"])
    plan = fxreg.explain(HEADED, rule)
    if meant is None:
        assert plan.lints == ()
    else:
        assert [edit.site for edit in plan.edits] == ["body.0.weight", "head.weight"]
        (lint,) = plan.lints
        assert (lint.kind, lint.labels, lint.sites) == ("idle-exclude", ("clip_norm",), ())
        assert "leaves out nothing: no parameter has that full name." in lint.message
        assert meant in lint.message
        assert fxreg.explain(fxreg.transform(HEADED, rule)).lints == plan.lints
        optional = fxreg.Rule(fxreg.clip_norm(1.0), param="weight", exclude=exclude, optional=True)
        assert fxreg.explain(HEADED, optional).lints == ()


@pytest.mark.parametrize(
    ("exclude", "meant"),
    [("head.*", "'head'"), ("head.weight", "'head'"), ("0", "'*.0'"), ("nope", "Mend it"), ("head", None), ("", None)],
)
def test_exclusions_of_activations_name_modules(exclude: str, meant: str | None) -> None:
    rule = fxreg.Rule(fxreg.l1(0.1), layer="Linear", on="output", exclude=exclude)
    messages = [lint.message for lint in fxreg.explain(HEADED, rule).lints]
    assert len(messages) == (meant is not None)
    assert all("no module has that path." in one and str(meant) in one for one in messages)


# Double decay.


def decays(optimizer: torch.optim.Optimizer, model: nn.Module, *rules: fxreg.Rule) -> list[tuple[Any, ...]]:
    lints = fxreg.lint(fxreg.transform(model, rules), optimizer=optimizer)
    assert lints == fxreg.lint(model, rules, optimizer=optimizer)  # nothing about the graph of a linear layer
    return [(lint.labels, lint.sites) for lint in lints if lint.kind == "double-decay"]


def test_a_penalty_and_the_optimizers_decay_on_one_parameter() -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())  # its default is weight_decay=0.01
    weight, both = fxreg.Rule(fxreg.l2(0.1), param="weight"), fxreg.Rule(fxreg.elastic_net(0.1, 0.2), param="weight")
    assert decays(optimizer, model, weight) == [(("l2",), ("weight",))]
    assert decays(optimizer, model, fxreg.Rule(fxreg.l2(0.1), param="weight", via="gradient")) == [
        (("l2",), ("weight",))
    ]
    assert decays(optimizer, model, both) == [(("elastic_net",), ("weight",))]
    assert decays(optimizer, model, fxreg.Rule(fxreg.elastic_net(0.1, 0.0), param="weight")) == []
    assert decays(optimizer, model, fxreg.Rule(fxreg.l1(0.1), param="weight")) == []
    assert decays(torch.optim.AdamW(model.parameters(), weight_decay=0.0), model, weight) == []
    assert decays(torch.optim.SGD(model.parameters()), model, weight) == []
    undecided = fxreg.Rule(fxreg.l2(0.1), param="weight", where=fxreg.last())
    assert fxreg.lint(model, undecided, optimizer=optimizer) == ()  # nobody has looked at the graph
    groups = [{"params": [model.weight], "weight_decay": 0.0}, {"params": [model.bias]}]
    assert decays(torch.optim.AdamW(groups), model, weight) == []


def test_a_penalty_and_a_rule_for_the_optimizer_on_one_parameter() -> None:
    model = nn.Linear(4, 2)
    rules = [fxreg.Rule(fxreg.l2(0.1), param="weight"), fxreg.Rule(fxreg.weight_decay(0.1), param="weight")]
    optimizer = torch.optim.AdamW(fxreg.param_groups(model, rules, torch.optim.AdamW))
    assert decays(optimizer, model, *rules) == [(("l2",), ("weight",))]
    rules = [fxreg.Rule(fxreg.l2(0.1), param="bias"), fxreg.Rule(fxreg.weight_decay(0.1), param="weight")]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    assert decays(optimizer, model, *rules) == [(("l2",), ("bias",))]  # said once


def test_decay_where_no_rule_asks_for_it() -> None:
    model = nn.Linear(4, 2)
    for rule in (
        fxreg.Rule(fxreg.l2(0.1), param="weight", via="optimizer"),
        fxreg.Rule(fxreg.weight_decay(0.1), param="weight", label="decay"),
    ):
        label = rule.label or "l2"
        assert decays(torch.optim.SGD(fxreg.param_groups(model, rule)), model, rule) == []
        assert decays(torch.optim.SGD(model.parameters(), weight_decay=0.2), model, rule) == [((label,), ("bias",))]


def test_lints_say_what_is_so_and_how_to_mend_it() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 2))
    gm = fxreg.transform(model, [fxreg.Rule(fxreg.l2(0.1), label="small")])
    lints = fxreg.lint(gm, optimizer=torch.optim.SGD(model[0].parameters(), weight_decay=0.5))
    assert list(map(str, lints)) == [
        "bias-or-norm: rule 'small' puts l2 on biases or normalization scales that it does not name: '1.weight', "
        "'1.bias', '2.bias'. Leave them out with exclude= (or param='weight'); if they are meant, say so with param= "
        "for biases, with layer= for normalizations.",
        "scale-invariant: rule 'small' penalizes the size of weights whose scale is taken out in train mode (by '1'): "
        "'0.weight'. To shrink such a weight changes no output, only the effective step size. Leave them out with "
        "exclude=, unless that is meant.",
        "double-decay: rule 'small' shrinks parameters that SGD shrinks too: '0.weight' are under weight_decay=0.5. "
        "Build the optimizer with weight_decay=0 for them (on the groups of fxreg.param_groups), or leave them out of "
        "the rule with exclude=.",
    ]


# Where they are told.


def test_both_reports_print_their_lints() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    rule = fxreg.Rule(fxreg.l2(0.1))
    plan, report = fxreg.explain(model, rule), fxreg.explain(fxreg.transform(model, rule))
    assert report.plan == plan
    assert [lint.kind for lint in plan.lints] == ["bias-or-norm"]
    assert [lint.kind for lint in report.lints] == ["bias-or-norm", "scale-invariant"]
    assert str(plan) == f"{plan.table()}\n\nlint: {plan.lints[0]}"
    assert [line for line in str(report).splitlines() if line.startswith("lint: ")] == [
        f"lint: {x}" for x in report.lints
    ]
    clean = fxreg.explain(model, fxreg.Rule(fxreg.l2(0.1), param="weight", layer="Linear"))
    assert str(clean) == clean.table()


def loaded(gm: Any) -> Any:
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, loaded, torch.compile])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_copied_pickled_and_compiled_modules_have_the_same_lints(name: str, again: Any) -> None:
    model, inputs = build(name)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.1)), example_inputs=inputs)
    assert {lint.kind for lint in fxreg.lint(gm)} == {
        "bias-or-norm",
        "unreached" if name == "mlp" else "scale-invariant",
    }
    assert fxreg.lint(again(gm)) == fxreg.lint(gm) == fxreg.explain(gm).lints


def test_lints_warn_where_that_is_asked_for() -> None:
    gm = fxreg.transform(nn.Linear(4, 2), fxreg.Rule(fxreg.l1(0.1)))
    with pytest.warns(UserWarning, match=r"fxreg: bias-or-norm: rule 'l1' puts l1 on biases .*: 'bias'\."):
        fxreg.lint(gm, warn=True)
    with pytest.warns(UserWarning, match="fxreg: bias-or-norm"):
        fxreg.lint(nn.Linear(4, 2), fxreg.Rule(fxreg.l1(0.1)), warn=True)


def test_lint_says_what_it_cannot_take() -> None:
    gm = fxreg.transform(nn.Linear(4, 2), fxreg.Rule(fxreg.l1(0.1)))
    with pytest.raises(fxreg.FxregError, match=r"model must be an nn\.Module or an ExportedProgram, got 3"):
        fxreg.lint(3)  # type: ignore[call-overload]
    with pytest.raises(
        fxreg.FxregError, match=r"optimizer must be a torch\.optim\.Optimizer, with its groups, got <class"
    ):
        fxreg.lint(gm, optimizer=torch.optim.SGD)  # type: ignore[arg-type]
    with pytest.raises(fxreg.RuleError, match=r"lint\(gm\) takes no rules"):
        fxreg.lint(torch.compile(gm), fxreg.Rule(fxreg.l1(0.1)))
    with pytest.raises(fxreg.FxregError, match=r"expected a module that fxreg\.transform returned"):
        fxreg.lint(nn.Linear(4, 2))
