"""What a model may read from another module, and call there."""

from typing import Any, ClassVar

from torch import Tensor

NUMBER = 2.0
TABLE = {"k": 2.0}


class Kept:
    """An object in a module, with a container in it and one in its class."""

    of_class: ClassVar = {"k": 2.0}

    def __init__(self) -> None:
        self.own = {"k": 2.0}


KEPT = Kept()


def doubled(x: Any) -> Any:
    """A function that a symbolic tracer must not go through."""
    return x * 2 if type(x) is Tensor else x


class Doubling:
    """An object that a symbolic tracer must not go through."""

    def of(self, x: Any) -> Any:
        return x * 2 if type(x) is Tensor else x

    __call__ = of


def twice(x: Tensor) -> Tensor:
    return x * 2


def thrice(x: Tensor) -> Tensor:
    return x * 3


def raise_level(of: Any) -> None:
    of.level += 1.0


def level(of: Any) -> float:
    return float(of.level)


def put(of: Any, name: str, value: Any) -> None:
    setattr(of, name, value)
