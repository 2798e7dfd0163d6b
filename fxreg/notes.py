"""What a recorder notes beside the graph: what the forwards asked, and which names they mentioned."""

from dataclasses import dataclass, field
from typing import Any

from .structure import alike


@dataclass
class Asked:
    """What the recorded forwards asked, beside sizes.

    Attributes:
        kinds: whether they asked for the data type or the device of a tensor.
        way: whether they asked if they were being compiled or traced.
        modes: the paths of the modules whose `training` they read.
        facts: what is so of tensors that modules keep: by path, name and attribute, its value.
    """

    kinds: bool = False
    way: bool = False
    modes: dict[str, None] = field(default_factory=dict)
    facts: dict[tuple[str, str, str], Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Mention:
    """An instruction that has to do with a name.

    Attributes:
        watched: the name, or the pattern that it fits, as it is watched.
        reader: the path of the module whose forward is traced.
        of_module: whether the owner may be a module, or lead to one if all its attributes are looked at.
        owner: whose attribute that is, if it is known, and its value is plain.
        path: of the owner, if it is a module.
        value: what the attribute was; an ellipsis if there was none.
    """

    watched: str
    name: str
    reader: str
    of_module: bool = True
    owner: Any = None
    path: str | None = None
    value: Any = ...

    def is_still(self) -> bool:
        """Whether the attribute is what it was."""
        return self.owner is not None and alike(getattr(self.owner, self.name, ...), self.value)
