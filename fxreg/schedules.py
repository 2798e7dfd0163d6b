"""Strengths that change while training: the shapes of schedules, and what follows them.

A schedule is a function of the step that gives the factor on the initial strength; any such function will do. Those
here print what they are, and hold their last value once they are through.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from .arguments import checked_strength
from .controls import strengths
from .errors import RuleError

Schedule: TypeAlias = Callable[[int], float]
"""From the step, 0 at the start, to the factor on the initial strength: finite, and at least 0."""


@dataclass(frozen=True)
class linear:  # noqa: N801  called like the functions that people write themselves
    """A straight line, start + (end − start)·t/steps.

    Args:
        steps: how many steps it takes, at least 1.
        start: the factor at step 0, at least 0.
        end: the factor from then on, at least 0.

    Raises:
        RuleError: steps that are no positive integer, a factor that is negative, infinite or NaN.

    >>> from fxreg.schedules import linear
    >>> [linear(4)(t) for t in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    steps: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * _share(step, self.steps)


@dataclass(frozen=True)
class cosine:  # noqa: N801
    """Half a cosine wave, end + (start − end)·(1 + cos(π·t/steps))/2.

    Args:
        steps: how many steps it takes, at least 1.
        start: the factor at step 0, at least 0.
        end: the factor from then on, at least 0.

    Raises:
        RuleError: steps that are no positive integer, a factor that is negative, infinite or NaN.

    >>> from fxreg.schedules import cosine
    >>> [round(cosine(4)(t), 3) for t in range(6)]
    [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]

    Source: Loshchilov and Hutter (2017), "SGDR: stochastic gradient descent with warm restarts", eq. 5.
    """

    steps: int
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, step: int) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * _share(step, self.steps))) / 2


@dataclass(frozen=True)
class cubic:  # noqa: N801
    """Fast first and slow at the end, end + (start − end)·(1 − t/steps)³: gradual sparsification's.

    Args:
        steps: how many steps it takes, at least 1.
        start: the factor at step 0, at least 0.
        end: the factor from then on, at least 0.

    Raises:
        RuleError: steps that are no positive integer, a factor that is negative, infinite or NaN.

    >>> from fxreg.schedules import cubic
    >>> [cubic(2)(t) for t in range(4)]
    [0.0, 0.875, 1.0, 1.0]

    Source: Zhu and Gupta (2017), "To prune, or not to prune", eq. 1.
    """

    steps: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, step: int) -> float:
        return self.end + (self.start - self.end) * (1 - _share(step, self.steps)) ** 3


@dataclass(frozen=True)
class step:  # noqa: N801
    """Stairs, factor^⌊t/every⌋.

    Args:
        every: the length of a stair in steps, at least 1.
        factor: from one stair to the next, at least 0.

    Raises:
        RuleError: a length that is no positive integer, a factor that is negative, infinite or NaN.

    >>> from fxreg.schedules import step
    >>> [step(2, factor=0.5)(t) for t in range(6)]
    [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """

    every: int
    factor: float = 0.1

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, step: int) -> float:
        return float(self.factor ** (step // self.every))


@dataclass(frozen=True)
class warmup:  # noqa: N801
    """A straight line from 0 to where another schedule starts, which follows it.

    Args:
        steps: how many steps it takes, at least 1.
        then: the schedule that follows, whose step 0 is when it is through; none keeps the factor at 1.

    Raises:
        RuleError: steps that are no positive integer; a `then` that cannot be called.

    >>> from fxreg.schedules import step, warmup
    >>> [warmup(2, then=step(2, factor=0.5))(t) for t in range(6)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.5]
    """

    steps: int
    then: Schedule | None = None

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, step: int) -> float:
        first = 1.0 if self.then is None else self.then(0)
        if step < self.steps or self.then is None:
            return first * _share(step, self.steps)
        return self.then(step - self.steps)


class StrengthScheduler:
    """Sets an emitted module's strengths as schedules say, by the protocol of `torch.optim.lr_scheduler`.

    The strength of a label becomes initial · schedule(t). It starts with t = 0, at once; `step()` goes on by one: call
    it once per optimizer step, or once per epoch if that is what the schedules count. Nothing is recompiled.

    Args:
        gm: what `fxreg.transform` returned, compiled or not. Its strengths at this moment are the initial ones.
        schedules: for labels of `fxreg.strengths(gm)`, a function of the step: one of `fxreg.schedules`, or any other.

    Raises:
        FxregError: not a module that `fxreg.transform` returned; an unknown label.
        RuleError: what cannot be called, or gives no finite number of at least 0.

    >>> import torch, fxreg
    >>> gm = fxreg.transform(torch.nn.Linear(4, 2), [fxreg.Rule(fxreg.l1(0.1))])
    >>> scheduler = fxreg.StrengthScheduler(gm, {"l1": fxreg.schedules.linear(4)})
    >>> scheduler.step()
    >>> fxreg.strengths(gm)
    {'l1': 0.025}
    """

    def __init__(self, gm: nn.Module, schedules: Mapping[str, Schedule]) -> None:
        if not isinstance(schedules, Mapping):
            raise RuleError(f"schedules must be a mapping of labels to functions of the step, got {schedules!r}.")
        for label, schedule in schedules.items():
            if not callable(schedule):
                raise RuleError(f"the schedule of {label!r} must be a function of the step, got {schedule!r}.")
        self._strengths = strengths(gm)
        self._schedules = dict(schedules)
        self._initial = {label: float(self._strengths[label]) for label in schedules}
        self._last: dict[str, float] = {}
        self._set(0)

    @property
    def last_step(self) -> int:
        """The step that the strengths are at."""
        return self._step

    def step(self) -> None:
        """Go on to the next step."""
        self._set(self._step + 1)

    def get_last_strength(self) -> dict[str, float]:
        """The strengths that were set last, by label."""
        return dict(self._last)

    def state_dict(self) -> dict[str, Any]:
        """The step and the initial strengths; not the schedules, which code makes again."""
        return {"last_step": self._step, "initial": dict(self._initial)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another scheduler with the same schedules was, and set the strengths that it had.

        Raises:
            RuleError: a state of other labels, or none of this kind; nothing is changed then.
        """
        initial, last = (state.get(key) if isinstance(state, Mapping) else None for key in ("initial", "last_step"))
        if not isinstance(initial, Mapping) or type(last) is not int or last < 0:
            raise RuleError(f"expected what StrengthScheduler.state_dict returned, got {state!r}.")
        if initial.keys() != self._schedules.keys():
            raise RuleError(f"the state is of a scheduler of {[*initial]}, and this one is of {[*self._schedules]}.")
        before = self._initial
        self._initial = {label: checked_strength(initial[label], f"initial[{label!r}]") for label in self._schedules}
        try:
            self._set(last)
        except BaseException:
            self._initial = before
            raise

    def _set(self, at: int) -> None:
        found: dict[str, float] = {}
        for label, schedule in self._schedules.items():
            where = f"the schedule of {label!r}, at step {at}"
            found[label] = checked_strength(self._initial[label] * checked_strength(schedule(at), where), where)
        for label, strength in found.items():
            self._strengths[label] = strength
        self._step, self._last = at, found


def _share(step: int, steps: int) -> float:
    return min(step / steps, 1.0)


def _check(schedule: Any) -> None:
    for name, value in vars(schedule).items():
        if name == "then":
            if value is not None and not callable(value):
                raise RuleError(f"{schedule!r}: then must be a function of the step.")
        elif name in ("steps", "every"):
            if type(value) is not int or value < 1:
                raise RuleError(f"{schedule!r}: {name} must be a positive integer.")
        else:
            checked_strength(value, f"{schedule!r}: {name}")
