"""Groups of several indices, heads and blocks, against loops over them in NumPy's float64."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim

import fxreg

from .test_constraints import shifted
from .test_effects import gradient_of, penalty_of
from .test_proximal import draw_weight, moved

Array = np.ndarray[Any, np.dtype[np.float64]]

# (shape, dim, size), and the same as a size for each dimension that names groups.
CASES: dict[str, tuple[tuple[int, ...], Any, Any, dict[int, int]]] = {
    "heads of rows": ((8, 3), 0, 2, {0: 2}),
    "heads of columns": ((3, 8), -1, 4, {1: 4}),
    "of a vector": ((6,), 0, 3, {0: 3}),
    "blocks": ((6, 4), (0, 1), (3, 2), {0: 3, 1: 2}),
    "blocks, columns first": ((6, 4), (1, 0), (2, 3), {0: 3, 1: 2}),
    "square blocks": ((6, 4), (0, -1), 2, {0: 2, 1: 2}),
    "blocks of channels": ((4, 6, 2, 3), (0, 1), (2, 3), {0: 2, 1: 3}),
    "heads of channels": ((2, 6, 3), 1, 2, {1: 2}),
    "rows of blocks": ((4, 6), (0, 1), (1, 3), {0: 1, 1: 3}),
    "one dimension twice": ((4, 6), (0, -2), 2, {0: 2}),
    "all of it": ((4, 3), 0, 4, {0: 4}),
    "empty": ((0, 3), 0, 2, {0: 2}),
}


def groups(w: Array, along: dict[int, int]) -> Iterator[Any]:
    """The groups' indices."""
    starts = [range(0, w.shape[d], step) for d, step in along.items()]
    for corner in itertools.product(*starts):
        index = [slice(None)] * w.ndim
        for (d, step), start in zip(along.items(), corner, strict=True):
            index[d] = slice(start, start + step)
        yield tuple(index)


def each(w: Array, along: dict[int, int], formula: Callable[[Array], Array]) -> Array:
    """What a formula makes of each group."""
    found = np.full_like(w, np.nan)
    for group in groups(w, along):
        found[group] = formula(w[group])
    return found


def length(v: Array) -> float:
    return math.sqrt(math.fsum(float(x) ** 2 for x in v.flat))


def direction(v: Array) -> Array:
    return v / length(v) if length(v) else 0 * v


def weight_of(name: str) -> Tensor:
    """Normal numbers; the first group is of zeros, and the last one is large."""
    shape, _, _, along = CASES[name]
    w = draw_weight(3, shape)
    indices = list(groups(w.numpy(), along))
    if len(indices) > 1:
        w[indices[0]] = 0
        w[indices[-1]] *= 5
    return w


def close(found: Tensor, wanted: Array) -> None:
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-13, atol=1e-14)


# Penalties: the effect of strength 0.3, and its value and gradient for one group.

PENALTIES: dict[str, tuple[Callable[..., Any], Callable[[Array], float], Callable[[Array], Array]]] = {
    "group_lasso": (
        lambda **keys: fxreg.group_lasso(0.3, **keys), lambda v: 0.3 * length(v), lambda v: 0.3 * direction(v)
    ),
    "sparse_group_lasso": (
        lambda **keys: fxreg.sparse_group_lasso(0.1, 0.3, **keys),
        lambda v: 0.1 * float(np.abs(v).sum()) + 0.3 * length(v),
        lambda v: 0.1 * np.sign(v) + 0.3 * direction(v),
    ),
    "max_norm": (
        lambda **keys: fxreg.max_norm(0.3, limit=2.5, **keys),
        lambda v: 0.3 * max(0.0, length(v) - 2.5),
        lambda v: 0.3 * direction(v) * (length(v) > 2.5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_on_groups_is_the_sum_over_them_and_so_is_its_gradient(name: str, case: str) -> None:
    make, value, slope = PENALTIES[name]
    _, dim, size, along = CASES[case]
    w, effect = weight_of(case), make(dim=dim, size=size)
    found, gradient = penalty_of(effect, w)
    assert float(found) == pytest.approx(math.fsum(value(w.numpy()[g]) for g in groups(w.numpy(), along)), rel=1e-13)
    wanted = each(w.numpy(), along, slope)
    close(gradient, wanted)
    for via in ("penalty", "gradient"):
        close(gradient_of(w, torch.zeros_like(w), effect, via=via), wanted)


@pytest.mark.parametrize("name", PENALTIES)
def test_the_derivative_is_that_of_finite_differences(name: str) -> None:
    effect = PENALTIES[name][0](dim=(0, 1), size=(3, 2))
    w = draw_weight(1, (6, 4)).requires_grad_()
    formula = effect.definition.formula
    live = {one: torch.tensor(0.3, dtype=torch.float64) for one in effect.strengths}
    assert torch.autograd.gradcheck(lambda v: formula.value(v, live, effect.arguments), w)


@pytest.mark.parametrize("case", [name for name in CASES if name != "empty"])
def test_a_proximal_step_on_groups_satisfies_the_conditions_of_its_minimum(case: str) -> None:
    """p minimizes ½‖p − w‖² + t·Σ‖p_g‖: (w_g − p_g)/t is p_g's direction, or of norm at most 1 where p_g is 0."""
    _, dim, size, along = CASES[case]
    w = weight_of(case)
    limits = sorted(length(w.numpy()[group]) for group in groups(w.numpy(), along))
    t = limits[len(limits) // 2] * 1.01  # some go, some stay
    found = moved(fxreg.group_lasso(2 * t, dim=dim, size=size), w, 0.5).numpy()
    left = [bool(found[group].any()) for group in groups(found, along)]
    assert not all(left)
    assert any(left) == (len(left) > 2)
    for group in groups(found, along):
        dual = (w.numpy()[group] - found[group]) / t
        if found[group].any():
            np.testing.assert_allclose(dual, direction(found[group]), rtol=1e-12, atol=1e-13)
        else:
            assert length(dual) <= 1


@pytest.mark.parametrize("case", CASES)
def test_other_proximal_steps_are_those_of_each_group(case: str) -> None:
    _, dim, size, along = CASES[case]
    w = weight_of(case)

    def sparse(v: Array) -> Array:
        v = np.sign(v) * np.maximum(np.abs(v) - 0.5 * 0.1, 0)
        return direction(v) * max(length(v) - 0.5 * 0.3, 0)

    def hinge(v: Array) -> Array:
        return direction(v) * (max(2.5, length(v) - 0.5 * 0.3) if length(v) > 2.5 else length(v))

    for name, formula in (("sparse_group_lasso", sparse), ("max_norm", hinge)):
        close(moved(PENALTIES[name][0](dim=dim, size=size), w, 0.5), each(w.numpy(), along, formula))


# Constraints: the projection of one group.


def _in_l1_ball(v: Array) -> Array:
    return np.sign(v) * shifted(np.abs(v), 1.5) if np.abs(v).sum() > 1.5 else v


CONSTRAINTS: dict[str, tuple[Callable[..., Any], Callable[[Array], Array]]] = {
    "limit_norm": (lambda **k: fxreg.limit_norm(1.5, **k), lambda v: direction(v) * min(1.5, length(v))),
    "unit_norm": (lambda **k: fxreg.unit_norm(**k), direction),
    "min_max_norm": (
        lambda **k: fxreg.min_max_norm(low=1.0, high=2.5, rate=0.3, **k),
        lambda v: direction(v) * (0.3 * min(max(length(v), 1.0), 2.5) + 0.7 * length(v)),
    ),
    "simplex": (lambda **k: fxreg.simplex(total=2.0, **k), lambda v: shifted(v, 2.0)),
    "l1_ball": (lambda **k: fxreg.l1_ball(1.5, **k), _in_l1_ball),
    "l2_ball": (lambda **k: fxreg.l2_ball(1.5, **k), lambda v: direction(v) * min(1.5, length(v))),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_constraint_on_groups_projects_each(name: str, case: str) -> None:
    make, projection = CONSTRAINTS[name]
    _, dim, size, along = CASES[case]
    w = weight_of(case)
    found = moved(make(dim=dim, size=size), w)
    torch.testing.assert_close(found, torch.from_numpy(each(w.numpy(), along, projection)), rtol=1e-12, atol=1e-13)


# Of every kind.

EVERY: dict[str, Callable[..., Any]] = {name: one[0] for name, one in [*PENALTIES.items(), *CONSTRAINTS.items()]}


@pytest.mark.parametrize("name", EVERY)
def test_left_out_a_size_is_one_index(name: str) -> None:
    w = draw_weight(0, (4, 6))
    default = EVERY[name](dim=(0, 1))
    assert default == EVERY[name](dim=(0, 1), size=1)
    assert torch.equal(moved(default, w), moved(EVERY[name](dim=(0, 1), size=(1, 1)), w))


@pytest.mark.parametrize("name", EVERY)
def test_groups_of_a_dimension_are_those_of_the_matrix_with_a_row_for_each(name: str) -> None:
    w = draw_weight(0, (6, 4))
    alone = moved(EVERY[name](dim=0), w.reshape(3, 8)).reshape(6, 4)
    torch.testing.assert_close(moved(EVERY[name](dim=0, size=2), w), alone, rtol=1e-15, atol=1e-15)
    other_way = moved(EVERY[name](dim=1, size=2), w.T)
    torch.testing.assert_close(other_way.T, alone, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_parameters_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    effect = EVERY[name](dim=0, size=2)
    w = draw_weight(0, (4, 400), 200.0).to(dtype)  # the squares' sum is past float16
    assert torch.equal(moved(effect, w), moved(effect, w.float()).to(dtype))
    if name in PENALTIES:
        (value, slope), (wide, wide_slope) = penalty_of(effect, w), penalty_of(effect, w.float())
        assert torch.equal(value, wide)
        assert torch.equal(slope, wide_slope.to(dtype))


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_squares_that_are_no_float32_do_no_harm(magnitude: float) -> None:
    w = magnitude * torch.tensor([[3.0], [4.0], [0.0], [0.0]])
    value, slope = penalty_of(fxreg.group_lasso(1.0, size=2), w)
    assert float(value) == pytest.approx(5 * magnitude, rel=1e-6)
    torch.testing.assert_close(slope, torch.tensor([[0.6], [0.8], [0.0], [0.0]]))
    torch.testing.assert_close(gradient_of(w, torch.zeros(4, 1), fxreg.group_lasso(1.0, size=2)), slope)


@pytest.mark.parametrize("name", EVERY)
def test_memory_in_another_order_is_the_same_parameter(name: str) -> None:
    effect = EVERY[name](dim=(0, 1), size=2)
    w = draw_weight(0, (4, 6, 3, 3))
    other = w.clone(memory_format=torch.channels_last)
    torch.testing.assert_close(moved(effect, other), moved(effect, w), rtol=1e-14, atol=1e-14)
    if name in PENALTIES:
        torch.testing.assert_close(penalty_of(effect, other)[1], penalty_of(effect, w)[1], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", EVERY)
def test_what_is_no_size_is_refused_when_it_is_asked_for(name: str) -> None:
    for dim, size, message in (
        (0, 0, r"size=0\): size must be at least 1"), ((0, 1), (2, -2), "size must be at least 1"),
        (0, (2, 2), "size has 2 number"), ((0, 1), (1, 2, 3), "size has 3 number"), ((), 2, "dim names none"),
        (0, 2.0, r"size=…\): expected int"), (0, True, r"size=…\): expected int"),
    ):  # fmt: skip
        with pytest.raises(fxreg.RuleError, match=message):
            EVERY[name](dim=dim, size=size)


@pytest.mark.parametrize("name", EVERY)
def test_a_size_that_does_not_fit_is_refused_with_the_place(name: str) -> None:
    for dim, size, message in (
        (0, 4, "dimension 0 has 6 elements, not a multiple of size 4"),
        ((1, 0), (2, 5), "dimension 0 has 6 elements, not a multiple of size 5"),
        ((0, -2), (2, 3), "dimension 0 is there twice, with sizes 2 and 3"),
    ):
        with pytest.raises(fxreg.RuleError, match=rf"'weight' of shape \(6, 4\).*{message}"):
            fxreg.explain(nn.Linear(4, 6), fxreg.Rule(EVERY[name](dim=dim, size=size), param="weight"))


def test_channels_of_activations_have_groups_too() -> None:
    model, x = nn.Sequential(nn.Linear(3, 6), nn.Tanh()).double(), draw_weight(1, (5, 3))
    rule = fxreg.Rule(fxreg.group_lasso(0.3, dim=1, size=2), layer="Tanh", on="output")
    a = model(x)
    wanted = 0.3 * sum(part.square().sum().sqrt() for part in a.split(2, dim=1))
    torch.testing.assert_close(fxreg.penalties(fxreg.transform(model, rule), x)["group_lasso"], wanted.detach())
    rule = fxreg.Rule(fxreg.group_lasso(0.3, dim=1, size=4), layer="Tanh", on="output")
    with pytest.raises(fxreg.RuleError, match=r"output of 1 of shape \(5, 6\): dimension 1 has 6 elements"):
        fxreg.transform(model, rule, example_inputs=(x,))
    message = r"group_lasso does not fit a tensor of shape \(5, 6\): dimension 1 has 6 elements"
    with pytest.raises(fxreg.RuleError, match=message):
        fxreg.transform(model, rule)(x).sum().backward()
    with pytest.raises(fxreg.RuleError, match=message):
        fxreg.transform(model, rule, emit="output")(x)


# Heads of attention.


def test_rows_of_in_proj_weight_are_heads_of_queries_then_of_keys_then_of_values() -> None:
    attention = nn.MultiheadAttention(6, 3, batch_first=True).double()
    rules = [
        fxreg.Rule(fxreg.group_lasso(0.3, dim=0, size=2), param="in_proj_weight", label="in"),
        fxreg.Rule(fxreg.group_lasso(0.2, dim=1, size=2), name="out_proj", param="weight", label="out"),
    ]
    gm = fxreg.transform(attention, rules)
    parts = torch.nn.functional._in_projection_packed  # torch's own way of taking it apart
    eye = torch.eye(6, dtype=torch.float64)
    q, k, v = parts(eye, eye, eye, attention.in_proj_weight.detach(), torch.zeros(18, dtype=torch.float64))
    heads = [one.reshape(6, 3, 2)[:, head] for one in (q, k, v) for head in range(3)]
    found = fxreg.penalties(gm)
    torch.testing.assert_close(found["in"], 0.3 * sum(head.square().sum().sqrt() for head in heads))
    taken = attention.out_proj.weight.detach().reshape(6, 3, 2)  # what the output takes of each head
    torch.testing.assert_close(found["out"], 0.2 * sum(taken[:, head].square().sum().sqrt() for head in range(3)))


def test_training_with_blocks_is_that_of_the_loss_by_hand_and_ends_with_whole_blocks_of_zeros() -> None:
    x, y = draw_weight(1, (20, 4)), draw_weight(2, (20, 6))
    for via in ("penalty", "gradient", "proximal"):
        torch.manual_seed(0)
        model, reference = nn.Linear(4, 6).double(), nn.Linear(4, 6).double()
        reference.load_state_dict(model.state_dict())
        rule = fxreg.Rule(fxreg.group_lasso(0.1, dim=(0, 1), size=2), param="weight", via=via)  # type: ignore[arg-type]
        gm = fxreg.transform(model, rule)
        optimizer, by_hand = optim.SGD(model.parameters(), lr=0.5), optim.SGD(reference.parameters(), lr=0.5)
        if via == "proximal":
            fxreg.ProximalStep(optimizer, gm)
        for _ in range(100 if via == "proximal" else 20):
            for module, one in ((gm, optimizer), (reference, by_hand)):
                one.zero_grad()
                loss = (module(x) - y).square().mean()
                if module is reference and via != "proximal":
                    blocks = (block for rows in module.weight.split(2, 0) for block in rows.split(2, 1))
                    loss = loss + 0.1 * sum(block.norm() for block in blocks)
                loss.backward()
                one.step()
            if via == "proximal":
                with torch.no_grad():
                    for rows in reference.weight.split(2, 0):
                        for block in rows.split(2, 1):
                            block.mul_((1 - 0.5 * 0.1 / block.norm()).clamp_min(0))
            torch.testing.assert_close(model.weight, reference.weight, rtol=1e-12, atol=1e-12)
        gone = [not block.any() for rows in model.weight.split(2, 0) for block in rows.split(2, 1)]
        assert (0 < sum(gone) < 6) == (via == "proximal")
