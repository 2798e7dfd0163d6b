"""What a model's class does in its own way with its state, the emitted module does, too; and who may copy one."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxreg


class Own(nn.Module):
    """Everything that changes or gives the state of this one does more than `nn.Module` does."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(3, 3), nn.Dropout(0.5)
        self.fixed = nn.Parameter(torch.ones(3))
        self.scales = torch.ones(3) / 3  # no buffer
        self.level = 1
        self.register_load_state_dict_post_hook(_count)
        self._register_state_dict_hook(_mark)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc(x)) * self.fixed * self.scales

    def eval(self) -> "Own":
        super().eval()
        self.drop.train()  # Monte Carlo dropout
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "Own":
        super().requires_grad_(requires_grad)
        self.fixed.requires_grad_(False)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Own":
        super()._apply(fn, recurse)
        self.scales = fn(self.scales)
        return self

    def get_extra_state(self) -> dict[str, int]:
        return {"level": self.level}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.level = state["level"]

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        state[f"{prefix}fixed"] = 2 * state[f"{prefix}fixed"]  # a checkpoint of before
        super()._load_from_state_dict(state, prefix, *args)


def _count(module: Any, keys: Any) -> None:
    module.fc.loaded = getattr(module.fc, "loaded", 0) + 1


def _mark(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state[f"{prefix}mark"] = torch.zeros(())


def _load(module: Any) -> Any:
    state = {name: value for name, value in module.state_dict().items() if not name.endswith("mark")}
    extra = next(name for name in state if name.endswith("_extra_state"))
    return module.load_state_dict({**state, extra: {"level": 7}})


def _seen(model: Own, state: dict[str, Any]) -> list[Any]:
    """All that these methods may change, and what they give."""
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    values = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in state.items()}
    return [*flags, model.scales.dtype, model.level, getattr(model.fc, "loaded", 0), list(state), values]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.eval(),
        lambda module: module.train(False),
        lambda module: module.requires_grad_(),
        lambda module: module.double(),
        lambda module: module.to(torch.bfloat16),
        _load,
    ],
)
def test_what_the_model_does_in_its_own_way_happens_through_the_emitted_module(change: Any, inside: bool) -> None:
    found = []
    for emit in (lambda model: model, lambda model: fxreg.transform(model, fxreg.Rule(fxreg.l1(0.1)))):
        torch.manual_seed(0)
        model = Own()
        module = emit(model)
        module = nn.Sequential(module) if inside else module
        change(module)
        state = module.state_dict()
        found.append((_seen(model, state), state._metadata))  # type: ignore[attr-defined]
    if inside:  # between it and its children, the emitted module is one more module with a version
        assert found[0][1]["0"] == found[1][1]["0"]
    else:
        assert found[0][1] == found[1][1]
    assert found[0][0] == found[1][0]


def test_hooks_on_the_state_are_those_of_both() -> None:
    model = nn.Linear(2, 2)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.1)))
    gm.register_load_state_dict_pre_hook(lambda module, state, *_: state.update(bias=state["bias"] + 1))
    state = copy.deepcopy(model.state_dict())
    gm.load_state_dict(copy.deepcopy(state))
    assert torch.equal(model.bias, state["bias"] + 1)


def test_a_model_that_does_so_is_not_pickled_without_its_class() -> None:
    class Local(nn.Linear):
        def train(self, mode: bool = True) -> "Local":
            return super().train(False)  # type: ignore[return-value]

    gm = fxreg.transform(Local(2, 2), fxreg.Rule(fxreg.l1(0.1)))
    with pytest.raises((AttributeError, pickle.PicklingError), match="Local"):
        pickle.dumps(gm)


def test_a_shallow_copy_is_an_emitted_module_that_shares_everything() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    model.spare = nn.Linear(1, 1)
    gm = fxreg.transform(model[:1], fxreg.Rule(fxreg.l1(0.5), label="sparse"))
    other = copy.copy(gm)
    assert list(other.state_dict()) == list(gm.state_dict())
    assert all(a is b for a, b in zip(other.parameters(), gm.parameters(), strict=True))
    other.eval()
    assert not gm.training
    fxreg.strengths(other)["sparse"] = 0.25
    other(torch.zeros(1, 3)).sum().backward()
    weight = gm.get_parameter("0.weight")
    assert torch.equal(weight.grad, 0.25 * weight.sign())  # type: ignore[arg-type]
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(fxreg.CaptureError, match="changed"):
        other(torch.zeros(1, 3))


def test_replicas_are_refused_unless_nothing_acts_in_them() -> None:
    gm = fxreg.transform(nn.Linear(2, 2), fxreg.Rule(fxreg.l1(0.1)))
    with pytest.raises(fxreg.FxregError, match=r"DataParallel: .*Use DistributedDataParallel"):
        gm._replicate_for_data_parallel()  # type: ignore[operator]  # what nn.DataParallel calls for each device
    fxreg.strip(gm)._replicate_for_data_parallel()  # type: ignore[operator]
