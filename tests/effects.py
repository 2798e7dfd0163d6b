"""docs/effects.md, written from the registry: `python -m tests.effects`."""

import inspect
import re
from pathlib import Path
from typing import Any

import fxreg
from fxreg.constraining import Constraint
from fxreg.decorating import OptimizerOption
from fxreg.effects import Definition, Gradient, Penalty, registry
from fxreg.functions import FunctionPenalty
from fxreg.joining import Joint

PAGE = Path(__file__).parents[1] / "docs" / "effects.md"
_HEAD = """# Every effect

What a rule can do to the parameters that it matches. Written from the registry by `python -m tests.effects`; the
docstring of each effect says more: units, errors, kinks, an example. `via` lists the lowerings: the first is what
happens unless the rule says otherwise. [Methods](methods.md) says what each of them is, and what it costs.

The suite compares them with other people's numbers: Keras's regularizers and constraints, run on torch; Optax's and
timm's gradient transforms; the solutions of scikit-learn's linear models; and, for all of them, finite differences.
"""
_SECTIONS: dict[type, tuple[str, str]] = {
    Penalty: (
        "Penalties",
        "The objective becomes loss + s·R(w), for each parameter w by itself; w_g is a group of it.",
    ),
    FunctionPenalty: (
        "Penalties on the function",
        "The objective becomes loss + s·R(f), for the function f from the model's input to its output: rules with "
        '`on="input"`.',
    ),
    Gradient: (
        "Gradient transforms",
        "g is the loss's gradient of one parameter in one forward call, before any penalty's is added.",
    ),
    Constraint: (
        "Constraints",
        "`fxreg.ProximalStep` puts the parameter w back where it is allowed to be, after each step of the optimizer: "
        "there is\nnothing in the graph. [Proximal steps](proximal.md) has more.",
    ),
    OptimizerOption: (
        "Options of the optimizer",
        "`fxreg.param_groups` hands them over; there is nothing in the graph.",
    ),
}


def page() -> str:
    """What the page should say."""
    parts = [_HEAD]
    for kind, (title, note) in _SECTIONS.items():
        has_gradient = kind is Penalty
        parts += [
            f"\n## {title}\n\n{note}\n",
            "\n| effect | what it is |" + " gradient |" * has_gradient + " `via` | source |",
        ]
        parts.append("\n|" + "---|" * (4 + has_gradient) + "\n")
        kinds = (Gradient, Joint) if kind is Gradient else (kind,)
        parts += [_row(one, has_gradient) for one in _built_in() if type(one) in kinds]
    return "".join(parts)


def _built_in() -> list[Definition[Any]]:
    own = [one for name, one in registry.items() if getattr(fxreg, name, None) is one]
    return sorted(own, key=lambda one: one.name)


def _row(definition: Definition[Any], has_gradient: bool) -> str:
    what, gradient, source = _parts(definition)
    cells = [f"`{definition.name}{_signature(definition)}`", what, *([gradient] if has_gradient else [])]
    cells += [", ".join(definition.vias), source]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _signature(definition: Definition[Any]) -> str:
    parameters = inspect.signature(definition).parameters.values()
    return f"({', '.join(p.name if p.default is p.empty else f'{p.name}={p.default!r}' for p in parameters)})"


def _parts(definition: Definition[Any]) -> tuple[str, str, str]:
    """What a docstring says it is, its gradient, and its source, each on one line."""
    text = inspect.cleandoc(definition.__doc__ or "")
    found = {
        name: " ".join(match[1].split()) if (match := re.search(pattern, text, re.DOTALL)) else ""
        for name, pattern in (("gradient", r"\nGradient: (.*?)(?:\n\n|$)"), ("source", r"\nSource: (.*)"))
    }
    return " ".join(text.partition("\n\n")[0].split()), found["gradient"], found["source"].rstrip(".")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
