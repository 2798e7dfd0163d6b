"""The JSON Schema of rules files, from what `Rule` and the registered effects take."""

import inspect
import re
from typing import Any, get_args

from .arguments import Argument
from .effects import Definition, Via, registry
from .files import TENSORS
from .rules import On, Reduction, Rule

_TEXT = {"type": "string"}
_TEXTS = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}
_CLASSES = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}]}
_POSITION = {"$ref": "#/$defs/position"}
_POSITIONS = {"type": "array", "items": _POSITION, "minItems": 1}
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "strength": {"type": "number", "minimum": 0},
    "float": {"type": "number"},
    "int": {"type": "integer"},
    "bool": {"type": "boolean"},
    "str": _TEXT,
    "int[]": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]},
    "float[]": {"type": "array", "items": {"type": "number"}},
}
_KEYS: dict[str, dict[str, Any]] = {
    "effect": {"$ref": "#/$defs/effect"},
    "layer": _CLASSES,
    "op": _TEXT,
    "name": _TEXT,
    "param": _TEXT,
    "exclude": _TEXTS,
    "where": _POSITION,
    "on": {"enum": list(get_args(On))},
    "via": {"enum": list(get_args(Via))},
    "reduction": {"enum": list(get_args(Reduction))},
    "label": {"type": "string", "minLength": 1},
    "optional": {"type": "boolean"},
}


def rules_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of rules files, with the effects that are registered now: for editors.

    It says which keys, effects and arguments there are, and of what kind their values are. What fits together, only
    `fxreg.load_rules` knows.

    >>> import fxreg
    >>> fxreg.rules_schema()["$defs"]["effect"]["properties"]["l1"]["anyOf"][0]
    {'type': 'number', 'minimum': 0}
    """
    told = _told(Rule.__doc__)
    keys = {key: {**kind, "description": told[key]} for key, kind in _KEYS.items()}
    effects = {name: one for name, definition in registry.items() if (one := _effect(definition)) is not None}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Rules of fxreg",
        **_table({"$schema": _TEXT, "rules": {"type": "array", "items": {"$ref": "#/$defs/rule"}}}, ["rules"]),
        "$defs": {
            "rule": _table(keys, ["effect"]),
            "effect": _table(effects) | _ONE,
            "position": _table(
                {
                    "before": _CLASSES,
                    "after": _CLASSES,
                    "last": {"const": True},
                    "not": _POSITION,
                    "all": _POSITIONS,
                    "any": _POSITIONS,
                }
            )
            | _ONE,
        },
    }


_ONE = {"minProperties": 1, "maxProperties": 1}


def _table(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        **({"required": required} if required else {}),
    }


def _effect(definition: Definition[Any]) -> dict[str, Any] | None:
    """What an effect is given: a table, or its first argument alone; None if it needs a tensor."""
    taken = {a.name: a for a in definition.parameters if a.schema != "stream"}
    own = [taken[name] for name in definition.__signature__.parameters]
    required = [a.name for a in own if a.default is inspect.Parameter.empty]
    if any(a.schema in TENSORS and a.name in required for a in own):
        return None
    held = [a for a in own if a.schema not in TENSORS]
    told = _told(definition.__doc__)
    table = _table({a.name: _argument(a, told) for a in held}, required)
    alone = [_ARGUMENTS[held[0].schema]] if held and required in ([], [held[0].name]) else []
    about = " ".join(inspect.cleandoc(definition.__doc__ or "").partition("\n\n")[0].split())
    return {"description": about, **({"anyOf": [*alone, table]} if alone else table)}


def _argument(argument: Argument, told: dict[str, str]) -> dict[str, Any]:
    return {**_ARGUMENTS[argument.schema], **({"description": told[argument.name]} if argument.name in told else {})}


def _told(doc: str | None) -> dict[str, str]:
    """What a docstring says of each argument."""
    entries = re.search(r"\nArgs:\n(.*?)(?:\n\n|$)", inspect.cleandoc(doc or ""), re.DOTALL)
    found = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", entries[1] if entries else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}
