"""One truth: the emitted module's parameters, buffers, names, order and mode are the model's own."""

import copy
import gc
import math
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxreg

from .models import CASES, MLP, build


def emit_from(model: nn.Module) -> torch.fx.GraphModule:
    return fxreg.transform(model, [fxreg.Rule(fxreg.l1(0.1)), fxreg.Rule(fxreg.clip_norm(1.0))])


@pytest.mark.parametrize("model", CASES)
def test_names_order_and_keys_are_the_models(model: str) -> None:
    original, _ = build(model)
    gm = emit_from(original)
    assert [n for n, _ in gm.named_parameters()] == [n for n, _ in original.named_parameters()]
    assert list(gm.state_dict()) == list(original.state_dict())
    assert all(a is b for a, b in zip(gm.parameters(), original.parameters(), strict=True))
    own = [n for n, _ in gm.named_buffers() if not n.startswith("fxreg.")]
    assert own == [n for n, _ in original.named_buffers()]
    gm.load_state_dict(original.state_dict(), strict=True)
    original.load_state_dict(gm.state_dict(), strict=True)


def test_transform_changes_nothing_in_the_model() -> None:
    model, _ = build("cnn")
    before = {path: dict(vars(m)) for path, m in model.named_modules()}
    values = copy.deepcopy(model.state_dict())
    emit_from(model)
    for path, module in model.named_modules():
        assert vars(module).keys() == before[path].keys()
        assert all(vars(module)[key] is value for key, value in before[path].items())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), values.values(), strict=True))


@pytest.mark.parametrize("model", ["mlp", "opaque"])
def test_mode_has_one_truth(model: str) -> None:
    original, _ = build(model)
    gm = emit_from(original)
    gm.eval()
    assert not original.training
    assert not any(m.training for m in original.modules())
    original.train()
    assert gm.training
    assert all(m.training for m in gm.modules())
    original.eval()
    assert not gm.training


class Mixed(nn.Module):
    """A root with a parameter, a buffer that is rebound in forward, and dropout by the root's own flag."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(()))
        self.lin = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return nn.functional.dropout(self.lin(x) * self.gain, 0.5, self.training)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(torch.float64),
        lambda m: m.half().float(),
        lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.requires_grad_(False).requires_grad_(True),
    ],
)
@pytest.mark.parametrize("through", ["model", "gm"])
@pytest.mark.parametrize("kind", [Mixed, MLP])
def test_state_stays_shared_when_it_is_changed(kind: type, change: Any, through: str) -> None:
    model = kind()
    gm = emit_from(model)
    change(model if through == "model" else gm)
    for (name, ours), (other, theirs) in zip(gm.named_parameters(), model.named_parameters(), strict=True):
        assert name == other
        assert ours is theirs
    for name, theirs in model.named_buffers():
        assert gm.get_buffer(name) is theirs


def test_a_buffer_rebound_in_forward_is_rebound_for_both() -> None:
    model = Mixed()
    gm = emit_from(model)
    gm(torch.randn(2, 3))
    model(torch.randn(2, 3))
    gm(torch.randn(2, 3))
    assert float(model.seen) == float(gm.seen) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("how", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_strengths_keep_dtype_and_value_when_the_model_is_cast(how: Any) -> None:
    gm = emit_from(MLP())
    fxreg.set_loss_scale(gm, 3.0)
    how(gm)
    strength = fxreg.strengths(gm)["l1"]
    assert strength.dtype == torch.float64
    assert float(strength) == 0.1
    assert float(gm.fxreg.loss_scale) == 3.0  # type: ignore[arg-type, union-attr]


def test_the_meta_recipe_keeps_strengths() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        gm = emit_from(model)
    gm.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.fill_(0.5)
    assert float(fxreg.strengths(gm)["l1"]) == 0.1
    fxreg.strip(gm)
    fxreg.verify(gm, model, (torch.randn(3, 4),))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("model", CASES)
def test_copying_model_and_module_together_keeps_them_one(model: str, copier: Any) -> None:
    original, inputs = build(model)
    gm = emit_from(original)
    new_model, new_gm = copier((original, gm))
    assert all(a is b for a, b in zip(new_gm.parameters(), new_model.parameters(), strict=True))
    assert not any(a is b for a, b in zip(new_gm.parameters(), original.parameters(), strict=True))
    new_model.eval()
    assert not new_gm.training
    assert new_gm.code == gm.code
    assert str(fxreg.explain(new_gm)) == str(fxreg.explain(gm))
    fxreg.verify(new_gm, new_model, inputs)


def test_a_model_of_a_local_class_pickles_when_the_graph_does_not_need_it() -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x).relu()

    model = Local()
    gm = emit_from(model)
    restored = pickle.loads(pickle.dumps(gm))
    x = torch.randn(2, 3)
    assert torch.equal(restored(x), gm(x))
    restored.eval()
    assert not restored.training


def test_strip_shares_state_and_is_what_no_rules_give() -> None:
    model, inputs = build("transformer")
    gm = emit_from(model)
    stripped = fxreg.strip(gm)
    assert stripped.code == fxreg.transform(model, []).code
    assert all(a is b for a, b in zip(stripped.parameters(), model.parameters(), strict=True))
    assert torch.equal(stripped(*inputs), model(*inputs))
    assert not fxreg.strengths(stripped)


@pytest.mark.parametrize("model", CASES)
def test_strip_goes_back_to_what_was_captured_whatever_was_written_since(model: str) -> None:
    original, _ = build(model)
    plain = fxreg.transform(original, [])
    gm = emit_from(original)
    for node in reversed(gm.graph.nodes):
        node.meta.clear()
        if node.op == "output":
            node.args = (None,)
        elif not node.users and node.op != "placeholder":
            gm.graph.erase_node(node)
    gm.recompile()
    for _ in range(2):
        stripped = fxreg.strip(gm)
        assert stripped.code == plain.code
        assert [(n.name, n.meta) for n in stripped.graph.nodes] == [(n.name, n.meta) for n in plain.graph.nodes]
        stripped.graph.output_node().args = (None,)


def test_a_transformed_module_is_not_transformed_again() -> None:
    gm = emit_from(MLP())
    with pytest.raises(fxreg.CaptureError, match="already transformed"):
        fxreg.transform(gm, [fxreg.Rule(fxreg.l1(0.1))])
    with pytest.raises(fxreg.CaptureError, match="already transformed"):
        fxreg.transform(nn.Sequential(gm), [fxreg.Rule(fxreg.l1(0.1))])


def test_a_model_with_an_attribute_named_fxreg_is_refused() -> None:
    model = MLP()
    model.fxreg = nn.Linear(2, 2)
    with pytest.raises(fxreg.CaptureError, match="'fxreg'"):
        emit_from(model)


def test_nothing_keeps_a_dropped_model_alive() -> None:
    model = MLP()
    gm = emit_from(model)
    watched = weakref.ref(model)
    del model, gm
    gc.collect()
    assert watched() is None


def test_other_modules_are_no_emitted_modules() -> None:
    for call in (fxreg.strengths, fxreg.penalties, fxreg.strip, fxreg.diff, fxreg.explain):
        with pytest.raises(fxreg.FxregError, match=r"fxreg\.transform"):
            call(MLP())  # type: ignore[operator]


def test_what_fxreg_remembers_is_saved_apart_and_resumes_exactly() -> None:
    def run(gm: torch.fx.GraphModule, steps: int) -> list[Tensor]:
        found = []
        for _ in range(steps):
            loss = gm(x).square().mean()
            found += torch.autograd.grad(loss, list(gm.parameters()))
        return found

    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    rules = [fxreg.Rule(fxreg.l1(0.1)), fxreg.Rule(fxreg.add_noise(0.1, seed=3))]
    gm = fxreg.transform(model, rules)
    run(gm, 2)
    fxreg.strengths(gm)["l1"] = 0.3
    fxreg.set_loss_scale(gm, 2.0)
    saved = fxreg.state_dict(gm)
    wanted = run(gm, 2)
    resumed = fxreg.transform(model, rules)
    fxreg.load_state_dict(resumed, saved)
    assert all(torch.equal(a, b) for a, b in zip(run(resumed, 2), wanted, strict=True))
    other = fxreg.transform(model, rules[:1])
    before = fxreg.state_dict(other)
    with pytest.raises(fxreg.FxregError, match=r"unexpected .*streams\.add_noise"):
        fxreg.load_state_dict(other, saved)
    with pytest.raises(fxreg.FxregError, match="shape"):
        fxreg.load_state_dict(other, {**before, "strengths.l1": torch.ones(2)})
    for bad in (math.nan, -0.1, math.inf):
        for name in ("strengths.l1", "loss_scale"):
            with pytest.raises(fxreg.RuleError, match=rf"'{name}': a strength is finite and not negative"):
                fxreg.load_state_dict(other, {**before, name: torch.tensor([bad])})
    with pytest.raises(fxreg.FxregError, match="'loss_scale' is a finite positive number"):
        fxreg.load_state_dict(other, {**before, "loss_scale": torch.zeros(1)})
    for odd in (None, [], {**before, "strengths.l1": 0.1}):
        with pytest.raises(fxreg.FxregError, match="a mapping of names to tensors"):
            fxreg.load_state_dict(other, odd)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(fxreg.state_dict(other).values(), before.values(), strict=True))


def test_a_wrapper_around_an_emitted_module_is_refused_with_where_it_is() -> None:
    gm = fxreg.transform(nn.Linear(2, 2), fxreg.Rule(fxreg.l1(0.1)))
    with pytest.raises(fxreg.FxregError, match=r"got Sequential\. There is one inside, at '0': pass that"):
        fxreg.strengths(nn.Sequential(gm))
