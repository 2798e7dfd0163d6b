"""What a rule selects, sentence by sentence, and against a second implementation on random trees of modules."""

import dataclasses
import fnmatch
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fxreg

from .models import CASES, build

thoroughly = settings(max_examples=150, deadline=None, derandomize=True)


def chosen(model: nn.Module, **keys: Any) -> list[str]:
    """The sites of one rule, optional so that none is an answer."""
    plan = fxreg.explain(model, fxreg.Rule(fxreg.l1(0.1), optional=True, **keys))
    return [edit.site for edit in plan.edits]


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Block(Gain):
    """Owns a parameter and has children: itself an owner, and an ancestor of owners."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * self.gain


class Tower(Gain):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Block(), Block())
        self.encoder.register_parameter("scale", nn.Parameter(torch.ones(2)))
        self.head = nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x * self.gain))


class Unrunnable(nn.Module):
    """Whoever captures or calls it fails the test."""

    def __init__(self, *, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("explain captures nothing, and transform refuses before it captures")


# name, layer, param.


@pytest.mark.parametrize("name", ["encoder.*", re.compile(r"encoder\..*"), r"re:encoder\..*"], ids=str)
def test_a_star_crosses_dots_and_does_not_reach_the_module_itself(name: Any) -> None:
    assert chosen(Tower(), name=name) == [
        f"encoder.{block}.{own}"
        for block in "01"
        for own in ("gain", "first.weight", "first.bias", "second.weight", "second.bias")
    ]


def test_the_module_itself_is_named_exactly_and_not_by_its_ancestors() -> None:
    assert chosen(Tower(), name="encoder") == ["encoder.scale"]
    assert chosen(Tower(), name="encoder.0") == ["encoder.0.gain"]
    assert chosen(Tower(), name="encoder*", param="[!wb]*") == ["encoder.scale", "encoder.0.gain", "encoder.1.gain"]


def test_the_roots_path_is_empty_and_a_star_matches_it() -> None:
    assert chosen(Tower(), name="") == ["gain"]
    assert chosen(Tower(), name="*") == [name for name, _ in Tower().named_parameters()]
    assert chosen(Tower(), name=re.compile("")) == ["gain"]
    assert "gain" not in chosen(Tower(), name="?*")


def test_name_is_the_owners_path_and_not_the_parameters() -> None:
    assert chosen(Tower(), name="head") == ["head.weight"]
    assert chosen(Tower(), name="head.weight") == []
    assert chosen(Tower(), name="*weight") == []


def test_globs_are_case_sensitive_on_every_platform() -> None:
    model = nn.ModuleDict({"Head": Gain(), "head": Gain()})
    assert chosen(model, name="Head") == ["Head.gain"]
    assert chosen(model, name="[!H]*") == ["head.gain"]
    assert chosen(model, param="Gain") == []


def test_a_pattern_matches_the_whole_name() -> None:
    assert chosen(Tower(), name=re.compile("enc")) == []
    assert chosen(Tower(), name="re:enc") == []
    assert chosen(Tower(), param=re.compile("bia")) == []
    assert chosen(Tower(), name=re.compile("HEAD", re.IGNORECASE)) == ["head.weight"]
    assert chosen(Tower(), name=re.compile("hea|head")) == ["head.weight"]


def test_layer_is_the_direct_owner_and_not_an_ancestor() -> None:
    assert chosen(Tower(), layer=Block) == ["encoder.0.gain", "encoder.1.gain"]
    assert chosen(Tower(), layer=nn.Sequential) == ["encoder.scale"]
    assert chosen(Tower(), layer=nn.ReLU) == []


def test_subclasses_are_of_the_layer_too() -> None:
    model = Tower()
    gains = ["gain", "encoder.0.gain", "encoder.1.gain"]
    assert chosen(model, layer=Gain) == gains
    assert chosen(model, layer="Gain") == gains
    assert chosen(model, layer=nn.Module) == [name for name, _ in model.named_parameters()]
    assert chosen(model, layer=(Block, "Sequential")) == ["encoder.scale", "encoder.0.gain", "encoder.1.gain"]


def test_the_weights_of_attention_belong_to_whom_they_belong() -> None:
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(4, 2)})
    assert chosen(model, layer=nn.MultiheadAttention) == ["mha.in_proj_weight", "mha.in_proj_bias"]
    assert chosen(model, layer=nn.Linear) == ["mha.out_proj.weight", "mha.out_proj.bias"]
    assert chosen(model, layer="NonDynamicallyQuantizableLinear", param="weight") == ["mha.out_proj.weight"]
    assert chosen(model, param="weight") == ["mha.out_proj.weight"]
    assert chosen(model, name="mha") == ["mha.in_proj_weight", "mha.in_proj_bias"]


@pytest.mark.parametrize(
    "layer", ["Linear", "nn.Linear", "torch.nn.Linear", "linear.Linear", "torch.nn.modules.linear.Linear"]
)
def test_a_string_is_a_dotted_suffix_of_the_qualified_name(layer: str) -> None:
    model = Tower()
    assert chosen(model, layer=layer) == chosen(model, layer=nn.Linear) != []


@pytest.mark.parametrize(
    "layer",
    [
        "Linea",
        "inear",
        "ar.Linear",
        "linear",
        "nn.linear",
        "torch.Linear",
        "nn.nn.Linear",
        "Conv9d",
        "nn.Block",
        "nn.F",
    ],
)
def test_what_is_no_suffix_of_any_class_is_a_rule_error_even_if_optional(layer: str) -> None:
    with pytest.raises(fxreg.RuleError, match=re.escape(repr(layer))):
        chosen(Tower(), layer=layer)


def test_a_class_of_torch_nn_that_the_model_lacks_is_known_and_matches_nothing() -> None:
    assert chosen(Tower(), layer="Conv2d") == []
    with pytest.raises(fxreg.MatchError):
        fxreg.explain(Tower(), fxreg.Rule(fxreg.l1(0.1), layer="Conv2d"))


def test_nn_means_torch_nn_though_another_package_has_an_nn_of_its_own() -> None:
    other = type("Linear", (Gain,), {"__module__": "elsewhere.nn"})
    model = nn.ModuleDict({"theirs": other(), "ours": nn.Linear(2, 2, bias=False)})
    assert chosen(model, layer="nn.Linear") == ["ours.weight"]
    assert chosen(model, layer="torch.nn.Linear") == ["ours.weight"]
    assert chosen(model, layer="elsewhere.nn.Linear") == ["theirs.gain"]
    assert chosen(model, layer="Linear") == ["theirs.gain", "ours.weight"]


def test_a_nested_class_is_found_by_its_qualified_name() -> None:
    class Local(Gain):
        pass

    model = nn.Sequential(Local())
    assert chosen(model, layer="Local") == ["0.gain"]
    assert chosen(model, layer="test_matching.Gain") == ["0.gain"]


def test_param_is_the_owners_own_key() -> None:
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(2, 1), "pruned": prune.identity(nn.Linear(2, 2), "weight")})
    assert chosen(model, param="weight") == ["mha.out_proj.weight"]
    assert chosen(model, param="weight_orig") == ["pruned.weight_orig"]
    assert chosen(model, param="*weight*", exclude="mha.out*") == ["mha.in_proj_weight", "pruned.weight_orig"]
    assert chosen(model, param="pruned.weight_orig") == []


def test_the_default_excludes_nothing_silently() -> None:
    for name in CASES:
        model, _ = build(name)
        assert chosen(model) == [key for key, _ in model.named_parameters()]


def test_all_conditions_must_hold_at_once() -> None:
    assert chosen(Tower(), layer=nn.Linear, name="encoder.1.*", param="weight", exclude="*.second.*") == [
        "encoder.1.first.weight"
    ]


# Parametrizations.


def test_parametrization_leaves_are_the_parametrized_layers_own() -> None:
    model = nn.ModuleDict({"deep": nn.ModuleDict({"fc": parametrizations.weight_norm(nn.Linear(3, 2))})})
    leaves = [f"deep.fc.parametrizations.weight.original{k}" for k in "01"]
    assert chosen(model, layer=nn.Linear, param="original*") == leaves
    assert chosen(model, layer="Linear", name="deep.fc", param="parametrizations.weight.original?") == leaves
    assert chosen(model, param="parametrizations.weight.original1") == leaves[1:]
    assert chosen(model, param="original0") == leaves[:1]
    assert chosen(model, name="deep.fc") == ["deep.fc.bias", *leaves]
    assert chosen(model, param="weight") == []
    assert chosen(model, name="*parametrizations*") == []
    assert chosen(model, exclude="*original0") == ["deep.fc.bias", leaves[1]]


def test_a_parametrized_root_owns_its_leaves_under_the_empty_path() -> None:
    model = parametrizations.weight_norm(nn.Linear(3, 2))
    assert chosen(model, name="", layer=nn.Linear) == [name for name, _ in model.named_parameters()]


def test_parametrization_leaves_are_read_raw() -> None:
    class Doubled(nn.Module):
        def forward(self, raw: Tensor) -> Tensor:
            return 2 * raw

    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    raw = model[0].parametrizations.weight.original
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.5), param="original"))
    assert float(fxreg.penalties(gm)["l1"]) == pytest.approx(0.5 * float(raw.detach().abs().sum()), rel=1e-6)
    (0.0 * gm(torch.ones(1, 3)).sum()).backward()
    assert torch.equal(raw.grad, 0.5 * raw.sign())


def test_where_sees_a_leaf_as_its_layers() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)))
    seen = {}
    chosen(model, where=lambda site: seen.update({site.name: site}))
    site = seen["0.parametrizations.weight.original1"]
    assert site.layer is model[0]
    assert site.param == "parametrizations.weight.original1"
    assert site.shape == (2, 3)


# Ties.


def tied() -> nn.Module:
    """One weight under three names: of an Embedding, of a Linear, and of a Linear whose key differs."""
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "mid": nn.Linear(3, 3), "decode": nn.Linear(3, 4)})
    model.decode.weight = model.embed.weight
    model["mid"].register_parameter("shared", model.embed.weight)
    return model


def test_a_tied_parameter_is_one_site_under_its_first_name() -> None:
    plan = fxreg.explain(tied(), fxreg.Rule(fxreg.l1(0.1), name="decode", param="weight"))
    (edit,) = plan.edits
    assert edit.site == "embed.weight"
    assert edit.aliases == ("mid.shared", "decode.weight")
    assert "mid.shared" in str(plan)


@pytest.mark.parametrize(
    "keys",
    [
        {"layer": nn.Embedding}, {"name": "decode", "layer": nn.Linear, "param": "weight"}, {"param": "shared"},
        {"name": "embed"}, {"layer": nn.Linear, "name": "mid", "param": "shared"},
    ],
    ids=str,
)  # fmt: skip
def test_one_matching_alias_suffices(keys: dict[str, Any]) -> None:
    assert chosen(tied(), **keys) == ["embed.weight"]


@pytest.mark.parametrize(
    "keys",
    [
        {"layer": nn.Embedding, "name": "decode"}, {"layer": nn.Linear, "name": "embed"},
        {"name": "embed", "param": "shared"}, {"layer": nn.Embedding, "param": "shared"},
    ],
    ids=str,
)  # fmt: skip
def test_conditions_must_hold_for_the_same_alias(keys: dict[str, Any]) -> None:
    assert chosen(tied(), **keys) == []


@pytest.mark.parametrize("name", ["embed.weight", "mid.shared", "decode.weight", "*.shared"])
def test_one_excluded_alias_excludes(name: str) -> None:
    assert chosen(tied(), exclude=name) == ["mid.weight", "mid.bias", "decode.bias"]


def test_a_module_under_two_names_is_one_owner_with_two_paths() -> None:
    shared = nn.Linear(2, 2, bias=False)
    model = nn.ModuleDict({"first": shared, "second": nn.Sequential(shared)})
    (edit,) = fxreg.explain(model, fxreg.Rule(fxreg.l1(0.1), name="second.0")).edits
    assert (edit.site, edit.aliases) == ("first.weight", ("second.0.weight",))
    assert chosen(model, exclude="second.*") == []


def test_where_runs_once_per_site_with_all_its_names() -> None:
    sites = []
    chosen(tied(), where=sites.append)
    assert [site.name for site in sites] == ["embed.weight", "mid.weight", "mid.bias", "decode.bias"]
    assert sites[0].aliases == ("mid.shared", "decode.weight")


def test_every_parameter_counts_once_however_many_names_it_has() -> None:
    model, inputs = build("transformer")
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l2(0.5)), emit="output")
    expected = 0.5 * sum(p.detach().double().square().sum() for p in model.parameters())
    assert float(gm(*inputs)[1].detach()) == pytest.approx(float(expected), rel=1e-6)


# exclude and where.


def test_exclude_is_on_the_full_parameter_name_and_implies_no_subtree() -> None:
    everything = [name for name, _ in Tower().named_parameters()]
    assert chosen(Tower(), exclude="encoder") == everything
    assert chosen(Tower(), exclude="encoder.0") == everything
    assert chosen(Tower(), exclude="weight") == everything
    assert chosen(Tower(), exclude="encoder.*") == ["gain", "head.weight"]
    assert chosen(Tower(), exclude="*.weight", layer=nn.Linear, name="encoder.0.*") == [
        "encoder.0.first.bias", "encoder.0.second.bias",
    ]  # fmt: skip


def test_a_lone_string_or_pattern_is_one_exclusion() -> None:
    for exclude in ("gain", ("gain",), ["gain"], re.compile("gain"), (re.compile("gain"),), "re:g.i."):
        assert "gain" not in chosen(Tower(), exclude=exclude)
        assert len(chosen(Tower(), exclude=exclude)) == len(chosen(Tower())) - 1


def test_where_runs_last() -> None:
    seen = []
    keys = {"layer": nn.Linear, "name": "encoder.*", "param": "weight", "exclude": "*.1.*"}
    assert chosen(Tower(), **keys, where=lambda site: seen.append(site.name) or site.name.endswith("d.weight")) == [
        "encoder.0.second.weight"
    ]
    assert seen == ["encoder.0.first.weight", "encoder.0.second.weight"]


def test_where_sees_what_the_parameter_is() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 5), nn.Linear(3, 2, dtype=torch.float64))
    assert chosen(model, where=lambda s: s.shape == (3, 2, 5) and s.numel == 30 and s.param == "weight") == ["0.weight"]
    assert chosen(model, where=lambda s: s.dtype == torch.float64) == ["1.weight", "1.bias"]
    assert chosen(model, where=lambda s: s.layer is model[1] and s.name == "1.bias") == ["1.bias"]
    assert chosen(model, where=lambda s: len(s.shape) >= 2) == ["0.weight", "1.weight"]


@pytest.mark.parametrize("keys", [{"exclude": "*"}, {"where": lambda site: False}, {"param": "nothing"}], ids=list)
def test_optional_is_needed_when_nothing_remains_in_the_end(keys: dict[str, Any]) -> None:
    with pytest.raises(fxreg.MatchError, match="optional=True"):
        fxreg.explain(Tower(), fxreg.Rule(fxreg.l1(0.1), **keys))
    assert chosen(Tower(), **keys) == []


# Rules among themselves.


def test_no_rules_are_allowed_and_do_nothing() -> None:
    model, inputs = build("mlp")
    assert fxreg.explain(model, []).edits == ()
    assert torch.equal(fxreg.transform(model, [])(*inputs), model(*inputs))


def test_a_bare_rule_is_a_list_of_one_and_so_is_any_sequence() -> None:
    rule = fxreg.Rule(fxreg.l1(0.1))
    plans = [fxreg.explain(Tower(), rules) for rules in (rule, [rule], (rule,), iter([rule]))]
    assert plans == plans[:1] * 4


def test_all_matching_rules_act_in_list_order() -> None:
    rules = [fxreg.Rule(fxreg.l2(0.1), name="head"), fxreg.Rule(fxreg.l1(0.1), param="weight", exclude="encoder.*")]
    assert [(e.label, e.site) for e in fxreg.explain(Tower(), rules).edits] == [
        ("l2", "head.weight"), ("l1", "head.weight"),
    ]  # fmt: skip


DUPLICATES: dict[str, tuple[Callable[[], fxreg.Rule], Callable[[], fxreg.Rule]]] = {
    "strength": (lambda: fxreg.Rule(fxreg.l2(0.1)), lambda: fxreg.Rule(fxreg.l2(0.2))),
    "via": (lambda: fxreg.Rule(fxreg.l2(0.1)), lambda: fxreg.Rule(fxreg.l2(0.1), via="gradient")),
    "optimizer": (lambda: fxreg.Rule(fxreg.l2(0.1)), lambda: fxreg.Rule(fxreg.l2(0.3), via="optimizer")),
    "label": (lambda: fxreg.Rule(fxreg.l1(0.1), label="a"), lambda: fxreg.Rule(fxreg.l1(0.1), label="b")),
    "two strengths": (
        lambda: fxreg.Rule(fxreg.elastic_net(0.1, 0.2)), lambda: fxreg.Rule(fxreg.elastic_net(0.3, 0.4)),
    ),
    "spelling": (
        lambda: fxreg.Rule(fxreg.group_lasso(0.1, dim=1), param="weight"),
        lambda: fxreg.Rule(fxreg.group_lasso(0.1, dim=(1,)), param="weight"),
    ),
    "transform": (lambda: fxreg.Rule(fxreg.scale(0.1)), lambda: fxreg.Rule(fxreg.scale(0.2))),
    "mask": (
        lambda: fxreg.Rule(fxreg.mask(torch.tensor(True))), lambda: fxreg.Rule(fxreg.mask(torch.tensor(True))),
    ),
    "freeze": (lambda: fxreg.Rule(fxreg.freeze()), lambda: fxreg.Rule(fxreg.freeze())),
    "noise": (lambda: fxreg.Rule(fxreg.add_noise(0.1, seed=1)), lambda: fxreg.Rule(fxreg.add_noise(0.2, seed=1))),
    "one site of many": (
        lambda: fxreg.Rule(fxreg.l1(0.1), name="encoder.*"), lambda: fxreg.Rule(fxreg.l1(0.1), name="*first"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("pair", DUPLICATES.values(), ids=DUPLICATES)
def test_one_effect_twice_on_one_site_is_an_error_whatever_the_strength_or_via(pair: Any) -> None:
    for attempt in (fxreg.explain, fxreg.transform):
        with pytest.raises(fxreg.MatchError, match="duplicate"):
            attempt(Tower(), [make() for make in pair])


EVERYWHERE: list[Callable[[nn.Module, Any], object]] = [
    fxreg.transform, fxreg.explain, fxreg.lint, fxreg.param_groups
]  # fmt: skip


@pytest.mark.parametrize("take", EVERYWHERE)
@pytest.mark.parametrize("place", ["", "body", "body.0"])
def test_a_module_inside_itself_is_refused(place: str, take: Callable[..., object]) -> None:
    model = nn.Sequential(OrderedDict(body=nn.Sequential(nn.Linear(2, 2)), again=nn.Linear(2, 2)))
    model.again = model.body  # a module that is twice in a model is not inside itself
    graph = torch.fx.symbolic_trace(model)
    for one in (model, graph):
        take(one, [])
        one.get_submodule("body.0").child = one.get_submodule(place)
        with pytest.raises(fxreg.CaptureError, match=r"module 'body\.0\.child' is inside itself.*Take it out"):
            take(one, [fxreg.Rule(fxreg.l1(0.1))])
        one.get_submodule("body.0").child = None


@pytest.mark.parametrize("take", EVERYWHERE)
def test_a_compiled_model_has_its_own_names(take: Callable[..., object]) -> None:
    model = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), backend="eager")
    take(model, [fxreg.Rule(fxreg.l1(0.1), layer="Linear", name="_orig_mod.0")])
    with pytest.raises(fxreg.MatchError, match=r"nearest modules: .*'_orig_mod\.0'"):
        take(model, [fxreg.Rule(fxreg.l1(0.1), name="0")])


@pytest.mark.parametrize("take", [fxreg.explain, fxreg.lint])
def test_a_transformed_model_has_its_rules(take: Callable[..., object]) -> None:
    gm = fxreg.transform(nn.Linear(2, 2), [])
    for one in (gm, torch.compile(gm, backend="eager")):
        with pytest.raises(fxreg.RuleError, match=r"\(gm\) takes no rules"):
            take(one, [fxreg.Rule(fxreg.l1(0.1))])


def test_duplicates_are_found_through_a_tie() -> None:
    rules = [fxreg.Rule(fxreg.l1(0.1), name="embed"), fxreg.Rule(fxreg.l1(0.1), name="decode")]
    with pytest.raises(fxreg.MatchError, match=r"embed\.weight"):
        fxreg.explain(tied(), rules)


@pytest.mark.parametrize(
    "rules",
    [
        (fxreg.Rule(fxreg.l1(0.1), param="weight"), fxreg.Rule(fxreg.l1(0.1), param="bias")),
        (fxreg.Rule(fxreg.group_lasso(0.1, dim=0)), fxreg.Rule(fxreg.group_lasso(0.1, dim=-1))),
        (fxreg.Rule(fxreg.l1(0.1)), fxreg.Rule(fxreg.elastic_net(0.1, 0.1))),
        (fxreg.Rule(fxreg.mask(torch.tensor(True))), fxreg.Rule(fxreg.mask(torch.tensor(False)))),
        (fxreg.Rule(fxreg.add_noise(0.1, seed=1)), fxreg.Rule(fxreg.add_noise(0.1, seed=2))),
    ],
    ids=["other sites", "other dimensions", "other effects", "other masks", "other seeds"],
)
def test_what_differs_in_more_than_strength_is_no_duplicate(rules: Any) -> None:
    assert len({edit.label for edit in fxreg.explain(Tower(), rules).edits}) == 2


def test_default_labels_are_the_effects_names_made_unique() -> None:
    rules = [
        fxreg.Rule(fxreg.l1(0.1), name="head"), fxreg.Rule(fxreg.l1(0.1), name=""), fxreg.Rule(fxreg.l2(0.1)),
        fxreg.Rule(fxreg.l1(0.1), name="encoder"),
    ]  # fmt: skip
    labels = {edit.site: edit.label for edit in fxreg.explain(Tower(), rules).edits if edit.label != "l2"}
    assert labels == {"head.weight": "l1", "gain": "l1_2", "encoder.scale": "l1_3"}


def test_default_labels_give_way_to_given_ones() -> None:
    rules = [
        fxreg.Rule(fxreg.l1(0.1), name="head"), fxreg.Rule(fxreg.l1(0.1), name="", label="l1"),
        fxreg.Rule(fxreg.l1(0.1), name="encoder"), fxreg.Rule(fxreg.l2(0.1), label="l1_2"),
    ]  # fmt: skip
    plan = fxreg.explain(Tower(), rules)
    labels = {edit.label for edit in plan.edits}
    assert len(labels) == 4
    assert {"l1", "l1_2"} < labels
    assert next(edit.label for edit in plan.edits if edit.site == "gain") == "l1"


def test_given_labels_are_unique_even_on_different_sites() -> None:
    rules = [fxreg.Rule(fxreg.l1(0.1), name="head", label="same"), fxreg.Rule(fxreg.l1(0.1), name="", label="same")]
    with pytest.raises(fxreg.MatchError, match="'same'"):
        fxreg.explain(Tower(), rules)


@pytest.mark.parametrize(
    "penalty",
    [
        fxreg.Rule(fxreg.l1(0.1), name="head"), fxreg.Rule(fxreg.l2(0.1), name="head", via="gradient"),
        fxreg.Rule(fxreg.l2(0.1), name="head", via="optimizer"), fxreg.Rule(fxreg.weight_decay(0.1), name="head"),
    ],
    ids=["penalty", "gradient", "optimizer", "weight_decay"],
)  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_a_penalty_on_what_a_rule_freezes_is_an_error(penalty: fxreg.Rule, first: bool) -> None:
    rules = [penalty, fxreg.Rule(fxreg.freeze(), param="weight", label="ice")]
    with pytest.raises(fxreg.MatchError, match=r"head\.weight") as caught:
        fxreg.explain(Tower(), rules if first else rules[::-1])
    for part in ("'ice'", penalty.effect.name, "frozen", "exclude="):
        assert part in str(caught.value)


def test_a_penalty_beside_what_a_rule_freezes_is_none() -> None:
    rules = [fxreg.Rule(fxreg.l1(0.1), exclude="head.*"), fxreg.Rule(fxreg.freeze(), name="head")]
    assert len(fxreg.explain(Tower(), rules).edits) == len(list(Tower().parameters()))


# The plan.


@pytest.mark.parametrize("name", CASES)
def test_sites_come_in_the_order_of_named_parameters(name: str) -> None:
    model, _ = build(name)
    names = [key for key, _ in model.named_parameters()]
    rules = [fxreg.Rule(fxreg.l1(0.1)), fxreg.Rule(fxreg.l2(0.1), where=lambda site: site.numel > 8)]
    for label in ("l1", "l2"):
        sites = [edit.site for edit in fxreg.explain(model, rules).edits if edit.label == label]
        assert sites == [key for key in names if key in sites]


def test_the_plan_is_frozen_data_that_compares_and_hashes() -> None:
    def make(strength: float = 0.1) -> Any:
        rules = [
            fxreg.Rule(fxreg.l1(strength), param="weight"),
            fxreg.Rule(fxreg.mask(torch.tensor([True, False])), name="head"),
            fxreg.Rule(fxreg.weight_decay(0.1), exclude="head.*"),
        ]
        return fxreg.explain(Tower(), rules)

    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != make(0.2)
    plan = make()
    for change in (
        lambda: setattr(plan, "edits", ()), lambda: setattr(plan.edits[0], "site", "x"),
        lambda: setattr(plan.edits[0].effect, "strengths", {}), lambda: plan.edits[0].effect.strengths.clear(),
    ):  # fmt: skip
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
            change()


def test_the_table_has_every_site_with_its_rule_size_strength_and_lowering() -> None:
    model = nn.ModuleDict({"deep": nn.Sequential(nn.Linear(1024, 3)), "head": nn.Linear(3, 1, bias=False)})
    rules = [
        fxreg.Rule(fxreg.l1(0.125), label="sparse"), fxreg.Rule(fxreg.l2(0.0625), param="weight", via="gradient"),
        fxreg.Rule(fxreg.clip_norm(2.5), name="head"), fxreg.Rule(fxreg.weight_decay(0.75), param="bias"),
    ]  # fmt: skip
    rows = [line.split() for line in fxreg.explain(model, rules).table().splitlines()]
    for expected in (
        ("sparse", "l1(0.125)", "deep.0.weight", "3,072", "penalty"),
        ("sparse", "l1(0.125)", "deep.0.bias", "3", "penalty"),
        ("sparse", "l1(0.125)", "head.weight", "3", "penalty"),
        ("l2", "l2(0.0625)", "deep.0.weight", "3,072", "gradient"),
        ("l2", "l2(0.0625)", "head.weight", "3", "gradient"),
        ("clip_norm", "clip_norm(2.5)", "head.weight", "3", "gradient"),
        ("weight_decay", "weight_decay(0.75)", "deep.0.bias", "3", "optimizer"),
    ):  # fmt: skip
        assert any(all(part in row for part in expected) for row in rows), expected
    assert len(rows) == 2 + 7


def test_explain_captures_nothing_and_changes_nothing() -> None:
    model = Unrunnable()
    model.inner.register_forward_pre_hook(lambda module, args: None)
    before = {path: (module.training, dict(vars(module))) for path, module in model.named_modules()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    fxreg.explain(model, [fxreg.Rule(fxreg.l1(0.1)), fxreg.Rule(fxreg.add_noise(0.1), name="inner")])
    assert {path: (module.training, dict(vars(module))) for path, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "rules",
    [
        [fxreg.Rule(fxreg.l1(0.1), name="nowhere")],
        [fxreg.Rule(fxreg.l1(0.1)), fxreg.Rule(fxreg.l1(0.2), param="bias")],
        [fxreg.Rule(fxreg.l1(0.1)), fxreg.Rule(fxreg.freeze())],
    ],
    ids=["no match", "duplicate", "frozen"],
)  # fmt: skip
def test_match_errors_come_before_capture(rules: Any) -> None:
    with pytest.raises(fxreg.MatchError):
        fxreg.transform(Unrunnable(), rules)


# Parameters that are not ordinary.


class Odd(nn.Module):
    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self.ordinary = nn.Parameter(torch.ones(2))
        self.odd = nn.Parameter(parameter, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.ordinary


ODD = {
    "int64": lambda: torch.ones(2, dtype=torch.int64),
    "int8": lambda: torch.ones(2, dtype=torch.int8),
    "bool": lambda: torch.ones(2, dtype=torch.bool),
    "complex64": lambda: torch.ones(2, dtype=torch.complex64),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@pytest.mark.parametrize(
    "effect",
    [fxreg.l1(0.1), fxreg.l2(0.1), fxreg.group_lasso(0.1), fxreg.clip_norm(1.0)],
    ids=lambda effect: effect.name,
)
def test_a_parameter_that_is_not_of_real_numbers_is_refused_with_the_remedy(
    odd: Any, effect: Any, request: Any
) -> None:
    with pytest.raises(fxreg.MatchError) as caught:
        fxreg.explain(Odd(odd()), fxreg.Rule(effect))
    for part in (effect.name, "'odd'", str(odd().dtype), "exclude="):
        assert part in str(caught.value)
    assert len(fxreg.explain(Odd(odd()), fxreg.Rule(effect, exclude="odd")).edits) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_every_floating_point_type_is_taken(dtype: torch.dtype) -> None:
    model = Odd(torch.full((2,), 0.5).to(dtype))
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l2(2.0), param="odd"))
    assert float(fxreg.penalties(gm)["l2"]) == 1.0


@pytest.mark.parametrize(
    ("rule", "note"),
    [
        (fxreg.Rule(fxreg.l1(0.5)), "counts in the value"),
        (fxreg.Rule(fxreg.clip_norm(0.1)), "no gradient to act on"),
        (fxreg.Rule(fxreg.weight_decay(0.1)), "left out"),
    ],
    ids=["penalty", "transform", "optimizer"],
)
def test_a_frozen_parameter_is_reported(rule: fxreg.Rule, note: str) -> None:
    table = str(fxreg.explain(Odd(torch.ones(2)), rule)).splitlines()
    assert note in next(line for line in table if " odd " in line)
    assert "frozen" not in next(line for line in table if " ordinary " in line)


def test_a_frozen_parameter_counts_in_the_value_and_gets_no_gradient() -> None:
    model = Odd(torch.full((2,), 3.0))
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.5)))
    assert float(fxreg.penalties(gm)["l1"]) == 0.5 * (2 + 6)
    gm(torch.ones(2)).sum().backward()
    assert model.odd.grad is None
    assert torch.equal(model.ordinary.grad, torch.tensor([1.5, 1.5]))


@pytest.mark.parametrize("rules", [fxreg.Rule(fxreg.l1(0.1)), fxreg.Rule(fxreg.clip_norm(1.0), name="1")])
def test_a_lazy_parameter_is_refused_until_it_has_a_shape(rules: fxreg.Rule) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(2))
    with pytest.raises(fxreg.FxregError, match=r"'1\.weight'"):
        fxreg.transform(model, rules)
    model(torch.ones(1, 2))
    assert fxreg.explain(model, rules).edits


def test_a_parameter_on_the_meta_device_is_planned_like_any_other() -> None:
    with torch.device("meta"):
        model = Tower()
    rules = [fxreg.Rule(fxreg.group_lasso(0.1, dim=0)), fxreg.Rule(fxreg.clip_norm(1.0))]
    assert fxreg.explain(model, rules) == fxreg.explain(Tower(), rules)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 4, 5)], ids=str)
def test_any_shape_is_a_site(shape: tuple[int, ...]) -> None:
    model = Odd(torch.zeros(shape))
    (edit,) = fxreg.explain(model, fxreg.Rule(fxreg.l1(0.1), param="odd")).edits
    assert edit.shape == shape


def test_a_slot_without_a_parameter_is_no_site() -> None:
    assert chosen(nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, affine=False))) == ["0.weight"]


# Against a second implementation.


@st.composite
def trees(draw: st.DrawFn) -> nn.Module:
    """A random tree of modules with random ties among its parameters."""
    keys = st.sampled_from(["a", "b", "w", "ab", "weight"])
    pool = [nn.Parameter(torch.zeros(1)) for _ in range(4)]
    classes = st.sampled_from([nn.Module, nn.ReLU, nn.Tanh, Bare])

    def grow(depth: int) -> nn.Module:
        module = draw(classes)()
        for key in draw(st.lists(keys, unique=True, max_size=2)):
            module.register_parameter(f"p_{key}", draw(st.sampled_from(pool)))
        if depth:
            for key in draw(st.lists(keys, unique=True, max_size=2)):
                module.add_module(key, grow(depth - 1))
        return module

    root = grow(3)
    root.register_parameter("p_last", nn.Parameter(torch.zeros(1)))
    return root


class Bare(nn.ReLU):
    """A subclass, to be found as a ReLU too."""


_globs = st.text(alphabet="abwp_.*?", max_size=5) | st.sampled_from(["*", "", "a.*", "*.b", "p_*", "*w*", "[ab]*"])


@thoroughly
@given(
    model=trees(),
    name=st.none() | _globs,
    param=_globs,
    layer=st.none() | st.sampled_from([nn.ReLU, Bare, (nn.Tanh, Bare), nn.Module]),
    exclude=st.lists(_globs, max_size=2),
)
def test_selection_agrees_with_its_definition_on_random_trees(
    model: nn.Module, name: str | None, param: str, layer: Any, exclude: list[str]
) -> None:
    names: dict[Tensor, list[str]] = {}
    for full, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(full)

    def selected(full: str) -> bool:
        path, _, key = full.rpartition(".")
        return (
            (name is None or fnmatch.fnmatchcase(path, name))
            and fnmatch.fnmatchcase(key, param)
            and isinstance(model.get_submodule(path), layer or object)
        )

    expected = [
        (first, tuple(names[parameter][1:]))
        for first, parameter in model.named_parameters()
        if any(map(selected, names[parameter]))
        and not any(fnmatch.fnmatchcase(full, glob) for glob in exclude for full in names[parameter])
    ]
    rule = fxreg.Rule(fxreg.l1(0.1), name=name, param=param, layer=layer, exclude=exclude, optional=True)
    assert [(edit.site, edit.aliases) for edit in fxreg.explain(model, rule).edits] == expected


def test_many_rules_try_their_effect_once_for_each_shape() -> None:
    tried: list[tuple[int, ...]] = []

    @fxreg.penalty
    def noting(w: Tensor) -> Tensor:
        tried.append(tuple(w.shape))
        return w.square().sum()

    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)))
    for _ in range(2):
        plan = fxreg.explain(model, [fxreg.Rule(noting(0.1 * (i + 1)), name=f"{i}") for i in range(20)])
    assert sorted(tried) == [(3,), (3, 3)]
    assert [edit.label for edit in plan.edits][::2] == ["noting", *(f"noting_{i}" for i in range(2, 21))]
