"""Selectors by position in the graph: which layers they mean, where they cannot tell, and that rules act just there."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxreg
from fxreg import after, before, last
from tests.models import build
from tests.test_lints import Calls


def selected(model: Any, where: Any, inputs: Any = None, **keys: Any) -> set[str]:
    """The weights on which a rule with a position acts."""
    keys = {"param": "*weight", **keys}
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.1), where=where, **keys), example_inputs=inputs)
    return {edit.site for edit in fxreg.explain(gm).plan.edits}


class Norm(nn.Module):
    """A normalization of somebody's own, with a reshape first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 4)
        return self.weight * x / x.norm(dim=-1, keepdim=True)


class Layer(nn.Module):
    """A linear layer of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.eye(4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight * self.gain).t()) + 1


def lin(bias: bool = True) -> nn.Linear:
    return nn.Linear(4, 4, bias=bias)


NEIGHBOURS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any, set[str]]] = {
    "directly": (
        lambda: nn.Sequential(lin(), nn.LayerNorm(4), lin(), nn.ReLU(), nn.LayerNorm(4), lin()),
        (3, 4),
        before(nn.LayerNorm),
        {"0.weight"},
    ),
    "directly behind": (
        lambda: nn.Sequential(lin(), nn.LayerNorm(4), lin(), nn.LayerNorm(4), nn.ReLU(), lin()),
        (3, 4),
        after(nn.LayerNorm),
        {"2.weight"},
    ),
    "by the name of a class, or of several": (
        lambda: nn.Sequential(lin(), nn.RMSNorm(4), lin(), nn.LayerNorm(4), lin(), nn.Sigmoid()),
        (3, 4),
        before(("nn.LayerNorm", "RMSNorm")),
        {"0.weight", "2.weight"},
    ),
    "by a class that others are derived from": (
        lambda: nn.Sequential(lin(), nn.BatchNorm1d(4)),
        (3, 4),
        before(nn.modules.batchnorm._NormBase),
        {"0.weight"},
    ),
    "through reshapes": (
        lambda: Calls(
            lambda m, x: m.bn(m.same(m.a(x).unsqueeze(1)).permute(0, 2, 1).contiguous().view(-1, 4)),
            a=lin(), bn=nn.BatchNorm1d(4), same=nn.Identity(),
        ),
        (3, 4),
        before("BatchNorm1d"),
        {"a.weight"},
    ),
    "back through reshapes": (
        lambda: Calls(
            lambda m, x: m.b(m.flat(m.a(x).transpose(1, 2))), a=nn.Conv1d(4, 3, 1), b=nn.Linear(15, 2),
            flat=nn.Flatten(),
        ),
        (3, 4, 5),
        after("Conv1d"),
        {"b.weight"},
    ),
    "what only reshapes is a neighbour, too": (
        lambda: nn.Sequential(lin(), nn.Flatten(), nn.Identity(), lin(), nn.ReLU()),
        (3, 4),
        before(nn.Identity) & ~after(nn.Identity),
        {"0.weight"},
    ),
    "one use of several": (
        lambda: Calls(lambda m, x: m.norm(y := m.a(x)) + m.b(y.relu()), a=lin(), b=lin(), norm=nn.LayerNorm(4)),
        (3, 4),
        before(nn.LayerNorm),
        {"a.weight"},
    ),
    "one call of several": (
        lambda: Calls(lambda m, x: m.a(m.norm(m.a(x))).relu(), a=lin(), norm=nn.LayerNorm(4)),
        (3, 4),
        before(nn.LayerNorm) & after(nn.LayerNorm),
        {"a.weight"},
    ),
    "not through an addition": (
        lambda: Calls(lambda m, x: m.norm(x + m.a(x)) + m.b(x), a=lin(), b=lin(), norm=nn.LayerNorm(4)),
        (3, 4),
        ~before(nn.LayerNorm),
        {"a.weight", "b.weight", "norm.weight"},
    ),
    "nor back through what wrote in place": (
        lambda: Calls(
            lambda m, x: (y := m.a(x), m.relu(y), m.b(y))[2] + m.c(x), a=lin(), b=lin(), c=lin(), relu=nn.ReLU(True)
        ),
        (3, 4),
        after(nn.ReLU) & ~after(nn.Linear),
        {"b.weight"},
    ),
    "not through what wrote in place": (
        lambda: Calls(lambda m, x: (y := m.a(x), y.relu_(), m.norm(y))[2], a=lin(), norm=nn.LayerNorm(4)),
        (3, 4),
        ~before(nn.LayerNorm),
        {"a.weight", "norm.weight"},
    ),
    "layers and normalizations of somebody's own": (
        lambda: nn.Sequential(Layer(), Norm(), Layer(), nn.ReLU(), Norm()),
        (3, 4),
        before(Norm),
        {"0.weight"},
    ),
    "behind layers of somebody's own": (
        lambda: nn.Sequential(Layer(), Norm(), Layer(), nn.ReLU(), Layer()),
        (3, 4),
        after((Norm, "Layer")),
        {"1.weight", "2.weight"},
    ),
    "a parameter beside other layers is where it is used": (
        lambda: Calls(
            lambda m, x: m.norm(F.linear(m.a(x).relu(), m.weight)), a=lin(), norm=nn.LayerNorm(4),
            weight=nn.Parameter(torch.eye(4)),
        ),
        (3, 4),
        before(nn.LayerNorm),
        {"weight"},
    ),
    "containers have neighbours": (
        lambda: nn.Sequential(lin(), nn.Sequential(lin(), lin()), lin()),
        (3, 4),
        before(nn.Sequential) | after(nn.Sequential),
        {"0.weight", "2.weight"},
    ),
    "a layer with several results": (
        lambda: Calls(lambda m, x: m.b(m.a(x)[0]), a=nn.LSTM(4, 4), b=lin()),
        (3, 4),
        after(nn.LSTM),
        {"b.weight"},
    ),
    "the last": (lambda: nn.Sequential(lin(), nn.ReLU(), lin(), nn.Softmax(-1)), (3, 4), last(), {"2.weight"}),
    "the last is somebody's own": (lambda: nn.Sequential(lin(), Layer()), (3, 4), last(), {"1.weight"}),
    "the last of several heads": (
        lambda: Calls(lambda m, x: (m.a(y := m.body(x)), m.b(y).relu()), body=lin(), a=lin(), b=lin(), unused=lin()),
        (3, 4),
        last(),
        {"a.weight", "b.weight"},
    ),
    "the last with a way around it": (
        lambda: Calls(lambda m, x: (y := m.a(x)) + m.b(y.relu()), a=lin(), b=lin()),
        (3, 4),
        last(),
        {"b.weight"},
    ),
    "the last is called more often": (
        lambda: Calls(lambda m, x: m.a(m.b(m.a(x))), a=lin(), b=lin()),
        (3, 4),
        last(),
        {"a.weight"},
    ),
    "the last is written into the result": (
        lambda: Calls(head_in_place, body=lin(), a=lin(), b=nn.Linear(4, 2)),
        (3, 4),
        last(),
        {"a.weight", "b.weight"},
    ),
    "a dropped result comes last nowhere": (
        lambda: Calls(lambda m, x: (m.b(m.a(x)), m.a(x))[1], a=lin(), b=lin()),
        (3, 4),
        last(),
        {"a.weight"},
    ),
    "the last is a parameter beside other layers": (
        lambda: Calls(lambda m, x: F.linear(m.a(x), m.weight), a=lin(), weight=nn.Parameter(torch.eye(4))),
        (3, 4),
        last(),
        {"weight"},
    ),
    "the last takes what is made of a parameter": (
        lambda: Calls(lambda m, x: F.linear(m.a(x), m.weight.t() * 2), a=lin(), weight=nn.Parameter(torch.eye(4))),
        (3, 4),
        last() & after(nn.Linear),
        {"weight"},
    ),
    "none": (lambda: nn.Sequential(lin(), nn.ReLU()), (3, 4), before(nn.BatchNorm1d), set()),
}  # fmt: skip


def head_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.body(x)
    result = torch.zeros_like(x)
    result[:, :2] = m.b(y)
    result.add_(m.a(y))
    return result


NOT_EXPORTED = {
    "what only reshapes is a neighbour, too",  # nn.Identity leaves no operator
    "a layer with several results",  # torch warns of the weights that an LSTM keeps
}
CASES = [(how, case) for case in NEIGHBOURS for how in ("traced", "recorded", "exported")]


@pytest.mark.parametrize(("how", "case"), [one for one in CASES if one[0] != "exported" or one[1] not in NOT_EXPORTED])
@pytest.mark.slow
def test_selectors_by_position_mean_these_layers(case: str, how: str) -> None:
    make, shape, where, expected = NEIGHBOURS[case]
    model: Any = make()
    x = torch.randn(shape)
    if how == "exported":
        model = torch.export.export(model, (x,))
    if how == "recorded" and isinstance(model, Calls):  # a forward that no trace goes through
        call = model.call
        model.call = lambda m, x: call(m, x) if x.sum() < 1e9 else x
    assert selected(model, where, (x,) if how == "recorded" else None, optional=True) == expected


# What they do to training.


@pytest.mark.parametrize("via", ["penalty", "gradient"])
def test_a_rule_acts_where_it_stands_and_nowhere_else(via: str) -> None:
    model, (x,) = build("cnn", torch.float64)
    rules = [
        fxreg.Rule(fxreg.l2(0.3), param="weight", where=before(nn.BatchNorm2d), via=via),
        fxreg.Rule(fxreg.l1(0.2), where=last(), via=via),
    ]
    model.drop.p = 0.0
    model.eval()
    model(x).square().sum().backward()
    by_hand = {name: p.grad.clone() for name, p in model.named_parameters()}
    by_hand["features.0.weight"] += 0.6 * model.features[0].weight.detach()
    by_hand["head.weight"] += 0.2 * model.head.weight.detach().sign()
    by_hand["head.bias"] += 0.2 * model.head.bias.detach().sign()
    model.zero_grad()
    gm = fxreg.transform(model, rules, example_inputs=(x,))
    gm(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, by_hand[name], rtol=1e-12, atol=1e-12)


def test_param_groups_know_positions() -> None:
    model, inputs = build("cnn")
    rules = [
        fxreg.Rule(fxreg.l2(0.1), param="weight", where=~last() & ~before("BatchNorm2d"), via="optimizer"),
        fxreg.Rule(fxreg.l1(0.1), where=before("Conv3d"), optional=True),
    ]
    gm = fxreg.transform(model, rules)
    for one in (model, gm, torch.compile(gm), loaded(gm)):
        decayed, rest = fxreg.param_groups(one, rules)
        assert decayed["weight_decay"] == 0.2
        assert [p.shape for p in decayed["params"]] == [model.features[1].weight.shape]
        assert len(rest["params"]) == 5
    decayed, _ = fxreg.param_groups(torch.export.export(model, inputs), rules)
    assert decayed["params"][0] is model.features[1].weight
    assert fxreg.explain(gm).unbound == ()


def loaded(gm: Any) -> Any:
    file = io.BytesIO()
    torch.save(copy.deepcopy(gm), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_param_groups_use_the_recordings_of_what_was_transformed() -> None:
    model, inputs = build("opaque")
    rule = fxreg.Rule(fxreg.l2(0.1), param="weight", where=last(), via="optimizer")
    gm = fxreg.transform(model, rule, example_inputs=inputs)
    assert fxreg.param_groups(gm, rule)[0]["params"] == [model.head.weight]
    with pytest.raises(fxreg.CaptureError, match=r"rule 'l2' asks for last\(\), and the graph does not show"):
        fxreg.param_groups(model, rule)


# What is not known yet, and what cannot be known.


def test_the_dry_run_says_on_what_it_depends() -> None:
    model, _ = build("cnn")
    rules = [
        fxreg.Rule(fxreg.l2(0.1), layer="Conv2d", where=before(nn.BatchNorm2d)),
        fxreg.Rule(fxreg.l1(1.0), where=last()),
    ]
    plan = fxreg.explain(model, rules)
    notes = [line.partition("penalty")[2].strip() for line in plan.table().splitlines()[2:]]
    assert notes == ["if before(BatchNorm2d)"] * 2 + ["if last()"] * 6
    carried_out = fxreg.explain(fxreg.transform(model, rules)).plan
    assert "if " not in str(carried_out)
    assert [edit.site for edit in carried_out.edits] == [
        "features.0.weight", "features.0.bias", "head.weight", "head.bias",
    ]  # fmt: skip


class Gate(nn.Module):
    """Opaque: it branches on a value."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.inside = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) if x.sum() < 1e9 else x


def test_a_layer_that_the_graph_does_not_show_is_not_guessed_at() -> None:
    model = nn.Sequential(Gate(lin(), nn.LayerNorm(4)), lin())
    message = (
        r"rule 'l1' asks for before\(LayerNorm\), and the graph does not show whether that is so of "
        r"'0\.inside\.0\.weight', because of '0': it is called as a whole \(asks __bool__ of a value\)\. Leave it out "
        r"with exclude='0\.inside\.0\.weight', select by name= instead, or pass example_inputs= so that"
    )
    with pytest.raises(fxreg.CaptureError, match=message):
        selected(model, before(nn.LayerNorm))
    assert selected(model, before(nn.LayerNorm), (torch.randn(3, 4),)) == {"0.inside.0.weight"}
    with pytest.raises(fxreg.MatchError, match="matched no parameter"):
        selected(model, before(nn.LayerNorm), exclude="0.*")


def test_what_goes_into_the_unseen_is_not_guessed_at_where_it_matters() -> None:
    model = nn.Sequential(lin(), Gate(nn.LayerNorm(4), lin()), lin())
    with pytest.raises(fxreg.CaptureError, match=r"asks for before\(LayerNorm\).*'0\.weight', because of '1'"):
        selected(model, before(nn.LayerNorm), name="0")
    with pytest.raises(fxreg.CaptureError, match=r"asks for after\(Linear\).*'2\.weight', because of '1'"):
        selected(model, after("Linear"), name="2")
    assert selected(model, before(nn.BatchNorm1d), name="0", optional=True) == set()
    assert selected(model, before(Gate), name="0") == {"0.weight"}
    assert selected(model, ~last()) == {
        "0.weight",
        "1.inside.0.weight",
        "1.inside.1.weight",
    }  # '2' comes after them all
    assert selected(model, last()) == {"2.weight"}
    with pytest.raises(fxreg.CaptureError, match=r"asks for last\(\).*'1\.inside\.0\.weight', because of '1'"):
        selected(nn.Sequential(lin(), Gate(nn.LayerNorm(4), lin())), last())


def test_torchs_own_layers_are_one_layer() -> None:
    model, _ = build("attention")
    inside = Calls(lambda m, x: m.a(m.mha(x, x, x)[0]), a=lin(), mha=nn.MultiheadAttention(4, 1))
    assert selected(inside, after(nn.Linear), name="a", optional=True) == set()
    assert selected(inside, after("MultiheadAttention"), name="a") == {"a.weight"}
    with pytest.raises(
        fxreg.CaptureError, match=r"'mha\.out_proj\.weight', because of 'mha': .*\(one layer of torch\)"
    ):
        selected(model, before(nn.LayerNorm))


def test_a_position_that_depends_on_the_mode_is_refused() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.norm(y) if m.training else m.norm(y.relu())

    model = Calls(forward, a=lin(), norm=nn.LayerNorm(4))
    with pytest.raises(fxreg.CaptureError, match=r"before\(LayerNorm\), which is so of 'a\.weight' in one of the ways"):
        selected(model, before(nn.LayerNorm), (torch.randn(3, 4),))
    assert selected(model, ~after(nn.LayerNorm), (torch.randn(3, 4),)) == {"a.weight", "norm.weight"}


def test_of_a_tied_weight_the_owners_that_the_rule_selects_count() -> None:
    model, _ = build("transformer")
    assert selected(model, last(), layer="Linear") == {"embed.weight"}  # it is decode's, too
    assert selected(model, last(), layer="Embedding", optional=True) == set()
    assert "embed.weight" not in selected(model, ~last())  # some call of it is the last


# Rules on what is left.


def test_nothing_left_is_an_error_unless_optional() -> None:
    model = nn.Sequential(lin(), nn.ReLU(), nn.LayerNorm(4))
    with pytest.raises(
        fxreg.MatchError, match=r"rule 'l1' \(param='\*weight', where=before\(LayerNorm\)\) matched no para"
    ):
        selected(model, before(nn.LayerNorm))
    assert selected(model, before(nn.LayerNorm), optional=True) == set()


def test_conflicts_are_looked_for_on_what_is_left() -> None:
    model = nn.Sequential(lin(), nn.LayerNorm(4), lin())
    first = fxreg.Rule(fxreg.l1(0.1), layer="Linear", where=before(nn.LayerNorm), label="one")
    apart = fxreg.Rule(fxreg.l1(0.2), layer="Linear", where=last(), label="other")
    plan = fxreg.explain(fxreg.transform(model, [first, apart])).plan
    assert [(edit.label, edit.site) for edit in plan.edits if edit.site.endswith("weight")] == [
        ("one", "0.weight"), ("other", "2.weight"),
    ]  # fmt: skip
    assert len(fxreg.explain(model, [first, apart]).edits) == 8
    for second in (fxreg.Rule(fxreg.l1(0.2), name="0"), fxreg.Rule(fxreg.l1(0.2), where=~last(), layer="Linear")):
        with pytest.raises(fxreg.MatchError, match=r"rules 'one' and 'l1' are duplicates: both put l1 on '0\.weight'"):
            fxreg.transform(model, [first, second])
    with pytest.raises(fxreg.MatchError, match=r"contradict each other: '0\.weight' is frozen by one"):
        fxreg.transform(model, [first, fxreg.Rule(fxreg.freeze(), name="0")])


def test_an_effect_must_fit_only_what_is_left() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2, bias=False)
    )
    rule = fxreg.Rule(fxreg.group_lasso(0.1, dim=3), where=before(nn.BatchNorm2d), name="[03]", param="weight")
    assert [edit.site for edit in fxreg.explain(fxreg.transform(model, rule)).plan.edits] == ["0.weight"]
    with pytest.raises(fxreg.RuleError, match=r"does not fit '3\.weight'"):
        fxreg.transform(model, fxreg.Rule(fxreg.group_lasso(0.1, dim=3), where=last()))


# What they are.


def test_positions_print_compare_and_pickle() -> None:
    position = before((nn.BatchNorm2d, "nn.LayerNorm")) & ~(after("Linear") | last())
    assert repr(position) == "before((BatchNorm2d, LayerNorm)) & ~(after(Linear) | last())"
    assert position == before([nn.BatchNorm2d, "nn.LayerNorm"]) & ~(after("Linear") | last())
    assert position != before([nn.BatchNorm2d, "nn.LayerNorm"]) | ~(after("Linear") | last())
    assert copy.deepcopy(position) == position
    assert repr(fxreg.Rule(fxreg.l1(0.1), where=before("Linear"))) == "Rule(l1(0.1), where=before(Linear))"


def test_what_is_no_position_is_refused() -> None:
    for wrong in (3, nn.Linear(2, 2), int, "not a name", ()):
        with pytest.raises(fxreg.RuleError, match=r"before: type (must be|is empty)"):
            before(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unsupported operand"):
        before("Linear") & (lambda site: True)
    with pytest.raises(
        fxreg.RuleError, match=r"rule 'l1': where=last\(\) selects layers by their parameters, but on='output'"
    ):
        fxreg.Rule(fxreg.l1(0.1), on="output", where=last())
    with pytest.raises(fxreg.RuleError, match=r"rule 'l1': where='Lin' names a class that is neither .*Mend where="):
        fxreg.explain(lin(), fxreg.Rule(fxreg.l1(0.1), where=before("Lin") | last()))
