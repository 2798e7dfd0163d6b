"""Islands: what is captured inside a module that runs as it is.

The reference is the module itself: an island put in the place of its forward must not change anything.
"""

import concurrent.futures
import copy
import pickle
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxreg
from fxreg.module import state_of

from .coverage import assert_unchanged_by, with_islands
from .families import FAMILIES

L1 = fxreg.Rule(fxreg.l1(0.01))
ONES = torch.ones(4, 3)
ZOO = {family.name: family for family in FAMILIES}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, scale: float = 1.0, *, mask: Tensor | None = None) -> Tensor:
        h = F.dropout(self.up(x).relu(), 0.25, self.training)
        h = h if mask is None else h * mask
        return x + self.down(h) * scale


class Dropping(nn.Module):
    """Drops layers at random: no graph can hold it, and any can hold its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for k, block in enumerate(self.blocks):
            if self.training and random.random() < 0.1:
                continue
            x = block(x, scale=0.5) if k % 2 else block(x, mask=x > -9)
        return x


def build(make: Any = Dropping) -> nn.Module:
    torch.manual_seed(0)
    random.seed(0)
    model: nn.Module = make()
    return model


def emitted(make: Any = Dropping, example: Any = (ONES,)) -> tuple[nn.Module, Any]:
    model = build(make)
    random.seed(1)
    return model, fxreg.transform(model, L1, example_inputs=copy.deepcopy(example))


def islands(gm: Any) -> dict[str, Any]:
    return dict(fxreg.explain(gm).islands)


def test_the_blocks_of_a_module_that_drops_them_are_seen() -> None:
    _, gm = emitted()
    assert list(islands(gm)) == ["blocks.0", "blocks.1", "blocks.2"]
    called = {node.target for node in islands(gm)["blocks.1"].graph.nodes if node.op == "call_module"}
    assert called == {"up", "down"}
    assert "island: blocks.2: a graph of" in str(fxreg.explain(gm))


def test_an_island_is_its_module_for_other_calls_too() -> None:
    model, gm = emitted()
    block: Any = model.blocks[1]  # type: ignore[index]
    island = islands(gm)["blocks.1"]
    for training in (True, False):
        model.train(training)
        for n in (4, 1, 7):
            ours, theirs = (torch.full((n, 3), 0.3, requires_grad=True) for _ in range(2))
            torch.manual_seed(n)
            got = island(ours, scale=0.5)
            torch.manual_seed(n)
            expected = block(theirs, scale=0.5)
            assert torch.equal(got, expected)
            got.square().sum().backward()
            expected.square().sum().backward()
            assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_islands_share_the_models_state_and_mode() -> None:
    model, gm = emitted()
    for path, island in islands(gm).items():
        block = model.get_submodule(path)
        ours, theirs = dict(island.named_parameters()), dict(block.named_parameters())
        assert ours.keys() == theirs.keys()
        assert all(ours[name] is theirs[name] for name in theirs)
    before = list(gm.state_dict())
    assert before == list(model.state_dict())
    assert len(list(gm.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))], ids=["copied", "pickled"])
def test_copies_have_islands_of_their_own(how: Any) -> None:
    model, gm = emitted()
    other = how(gm)
    assert list(islands(other)) == list(islands(gm))
    with torch.no_grad():
        other.blocks[0].up.weight.zero_()
    x = torch.randn(2, 3)
    model.eval()
    other.eval()
    mask = x > -9
    assert torch.equal(islands(other)["blocks.0"](x, mask=mask), other.blocks[0](x, mask=mask))
    assert not torch.equal(islands(other)["blocks.0"](x, mask=mask), islands(gm)["blocks.0"](x, mask=mask))


def test_hooks_stay_with_the_module() -> None:
    def make() -> nn.Module:
        model = Dropping()
        model.blocks[1].register_forward_hook(lambda module, args, output: output * 2)
        return model

    model, gm = emitted(make)
    model.eval()
    x = torch.randn(2, 3)
    block: Any = model.blocks[1]  # type: ignore[index]
    island = islands(gm)["blocks.1"]
    assert state_of(island).assumes(x, 0.5)
    assert torch.equal(island(x, 0.5), block.forward(x, 0.5))
    assert torch.equal(island(x, 0.5) * 2, block(x, 0.5))
    assert torch.equal(island(x, 0.25), block.forward(x, 0.25))  # not by the graph, and not with the hook
    assert len(block._forward_hooks) == 1


class Holder(Dropping):
    """Passes an object: what is done with it no graph can hold, but the blocks inside are reached all the same."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block()

        def forward(self, x: Tensor, seen: Any) -> Tensor:
            seen.count = len(x)
            return self.inner(x)

    class Seen:
        count = 0

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Outer()])

    def forward(self, x: Tensor) -> Tensor:
        seen = self.Seen()
        y = self.blocks[0](self.first(x), seen)
        return y * (2 if random.random() < 2 else 1) + seen.count


class Nested(Dropping):
    """Something whole inside an island."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.dropping = nn.Linear(3, 3), nn.Linear(3, 3), Dropping()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.dropping(self.one(x)))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Outer()])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x) * (1 if random.random() < 2 else 2)


class Single(Dropping):
    """Only single layers are inside: a graph of one says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.first(x)) * (1 if random.random() < 2 else 2)


class Failing(Dropping):
    """A block that fails when it is recorded is left alone."""

    class Outer(Block):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            type(self).calls += 1
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Outer()])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.first(x)) * (1 if random.random() < 2 else 2)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (Holder, ["blocks.0.inner"]),
        (
            Nested,
            ["blocks.0", "blocks.0.dropping.blocks.0", "blocks.0.dropping.blocks.1", "blocks.0.dropping.blocks.2"],
        ),
        (Single, []),
        (Failing, []),
    ],
)
def test_what_is_an_island(make: Any, found: list[str]) -> None:
    model, gm = emitted(make)
    assert list(islands(gm)) == found
    assert_unchanged_by(islands(gm), model, build(make), (ONES,))


def test_a_model_that_is_seen_through_has_none() -> None:
    _, gm = emitted(Block)
    assert not islands(gm)
    assert not islands(fxreg.transform(build(), L1))  # no examples


def test_the_model_is_left_as_it_was() -> None:
    model, twin = build(), build()
    model.blocks[0].eval()  # type: ignore[index, operator]
    random.seed(3)
    states = torch.get_rng_state(), random.getstate()
    fxreg.transform(model, L1, example_inputs=(ONES,))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert [list(vars(m)) for m in model.modules()] == [list(vars(m)) for m in twin.modules()]
    assert [m.training for m in model.modules()] == [
        not path.startswith("blocks.0") for path, _ in model.named_modules()
    ]
    assert nn.Module.__call__ is _CALL


_CALL = nn.Module.__call__


def test_a_forward_that_fails_leaves_everything_as_it_was() -> None:
    class Raising(Dropping):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                raise ValueError("as it is")
            return super().forward(x)

    with pytest.raises(ValueError, match="as it is"):
        fxreg.transform(build(Raising), L1, example_inputs=(ONES,))
    assert nn.Module.__call__ is _CALL


class Fixed(Dropping):
    """Its blocks are captured symbolically: nothing is asked of a call."""

    class Scaled(Block):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 0.5

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return x + self.down(self.up(x)) * self.scale

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Scaled()])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.first(x)) * (1 if random.random() < 2 else 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "scale", 2.0),
        lambda block: setattr(block, "up", nn.Linear(3, 3)),
        lambda block: setattr(block, "forward", lambda x: x * 7),
    ],
)
def test_an_island_says_when_its_module_changed(change: Any) -> None:
    model, gm = emitted(Fixed)
    block: Any = model.blocks[0]  # type: ignore[index]
    island = islands(gm)["blocks.0"]
    assert torch.equal(island(ONES), block.forward(ONES))
    change(block)
    with pytest.raises(fxreg.CaptureError, match="changed since it was captured"):
        island(ONES)


class Bound(Fixed):
    """A block that holds a method of itself, and one whose child knows it: no other object can stand for them."""

    class Method(Block):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.run = 0, self.counted

        def counted(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.down(self.up(x))

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.run(x)

    class Parent(Block):
        def __init__(self) -> None:
            super().__init__()
            vars(self.up)["parents"] = [self]

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Method(), self.Parent()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * (1 if random.random() < 2 else 2)


def test_a_module_that_knows_itself_is_no_island() -> None:
    model, gm = emitted(Bound)
    assert not islands(gm)
    assert model.blocks[0].calls == 0  # type: ignore[index, union-attr]


def test_a_model_that_fails_when_it_is_observed_has_no_islands() -> None:
    class Failing(Fixed):
        def forward(self, x: Tensor) -> Tensor:
            if nn.Module.__call__ is not _CALL:
                raise ValueError("observed")
            return super().forward(x)

    _, gm = emitted(Failing)
    assert not islands(gm)
    assert nn.Module.__call__ is _CALL


@pytest.mark.slow
def test_models_transformed_at_once_leave_everything_as_it_was() -> None:
    def work(_: int) -> int:
        return len(islands(fxreg.transform(Fixed(), L1, example_inputs=(ONES,))))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(8)))
    assert max(found) == 1  # one that sees another thread draw random numbers may hold back
    assert nn.Module.__call__ is _CALL


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wav2vec2", "funnel"])
def test_islands_of_real_models_change_nothing(name: str) -> None:
    model, examples = ZOO[name].make()
    gm = fxreg.transform(model, L1, example_inputs=examples)
    assert islands(gm)
    assert_unchanged_by(islands(gm), model, ZOO[name].make()[0], examples)


def test_that_test_runs_the_graphs_and_sees_another_island() -> None:
    model, gm = emitted()
    island = islands(gm)["blocks.1"]
    with with_islands(model, {"blocks.1": island}):
        assert state_of(island).assumes(ONES, 0.5)
    with with_islands(model, {"blocks.1": lambda x, **_: x * 2}), pytest.raises(AssertionError):
        assert_unchanged_by({}, model, build(), (ONES,))
