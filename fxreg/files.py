"""Rules in files, and what a file says of an effect, a layer and a position: one table for each rule."""

import difflib
import inspect
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from torch import Tensor

from .arguments import Argument, ByName, are_equal, coerced
from .classes import Layer, class_name
from .effects import Effect, registry
from .errors import RuleError
from .formats import read, write
from .positions import Beside, Both, Either, Last, Not, Position, after, before, last
from .rules import Rule, checked_rules

Rules: TypeAlias = Rule | Iterable[Rule] | str | os.PathLike[str]

KEYS = inspect.signature(Rule).parameters
TENSORS = ("Tensor", "anchor")
"""The kinds of arguments that no file holds."""


def load_rules(path: str | os.PathLike[str]) -> list[Rule]:
    """The rules in a file, in its order. `docs/files.md` says what a file may hold.

    Args:
        path: a `.toml`, `.yaml`, `.yml` or `.json` file. YAML needs the extra `fxreg[yaml]`.

    Raises:
        RuleError: no such file, text that is not in its format, or something that is no rule: the message has the
            number of the rule, the first being 1.
        FxregError: a package is lacking.

    >>> import pathlib, tempfile, fxreg
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "rules.toml")
    ...     _ = file.write_text('[[rules]]\\neffect.l1 = 1e-4\\nlayer = "Linear"\\nlabel = "sparse"')
    ...     fxreg.load_rules(file)
    [Rule(l1(0.0001), layer='Linear', label='sparse')]
    """
    said = read(path)
    if not isinstance(said, dict) or not isinstance(said.get("rules"), list):
        raise RuleError(f"{path}: the rules must be a list of tables under the key 'rules', as in [[rules]] of TOML.")
    if unknown := [key for key in said if key not in ("rules", "$schema")]:
        raise RuleError(f"{path}: there is no key {unknown[0]!r} beside 'rules'. Leave it out, or put it into a rule.")
    rules = []
    for number, one in enumerate(said["rules"], 1):
        try:
            rules.append(_rule(one))
        except RuleError as error:
            raise RuleError(f"{path}, rule {number}: {error}") from None
    return rules


def dump_rules(rules: Rules, path: str | os.PathLike[str]) -> None:
    """Write rules to a file, from which `fxreg.load_rules` makes equal ones. What is at its default is left out.

    Args:
        rules: the rules, or the path of a file with rules, perhaps in another format.
        path: a `.toml`, `.yaml`, `.yml` or `.json` file; one that is there is replaced. Writing TOML needs the extra
            `fxreg[toml]`, YAML `fxreg[yaml]`.

    Raises:
        RuleError: something that a file cannot hold: a function, a tensor, a class that is not torch's, an effect that
            is not registered any more; infinity in JSON. Nothing is written.
        FxregError: a package is lacking.

    >>> import pathlib, tempfile, fxreg
    >>> rule = fxreg.Rule(fxreg.group_lasso(1e-3, dim=1), layer="Conv2d", param="weight")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fxreg.dump_rules(rule, f"{folder}/rules.yaml")
    ...     print(pathlib.Path(folder, "rules.yaml").read_text().strip())
    rules:
    - effect:
        group_lasso:
          strength: 0.001
          dim: 1
      layer: Conv2d
      param: weight
    """
    said = []
    for number, rule in enumerate(given_rules(rules), 1):
        try:
            said.append(_said(rule))
        except RuleError as error:
            name = rule.label or rule.effect.name
            raise RuleError(f"{path}: rule {number}, {name!r}: {error} Keep this rule in Python.") from None
    write({"rules": said}, path)


def given_rules(rules: Rules) -> tuple[Rule, ...]:
    """The rules, or those in the file of that path."""
    return tuple(load_rules(rules)) if isinstance(rules, str | os.PathLike) else checked_rules(rules)


def _rule(said: Any) -> Rule:
    if not isinstance(said, dict):
        raise RuleError(f"a rule must be a table, got {said!r}.")
    for key, value in said.items():
        if key not in KEYS:
            raise RuleError(f"there is no key {key!r}; {_nearest(key, KEYS)}.")
        _check_value(key, value, may_be_table=key in ("effect", "where"))
    if "effect" not in said:
        raise RuleError("the key 'effect' is missing; write an effect, such as effect = { l1 = 1e-4 }.")
    given = dict(said)
    effect = _effect(given.pop("effect"))
    if "where" in given:
        given["where"] = _position(given["where"])
    return Rule(effect, **given)


def _check_value(key: object, value: object, *, may_be_table: bool = False) -> None:
    if value is None:
        raise RuleError(f"the key {key!r} has no value; give it one, or leave it out.")
    if isinstance(value, dict) and not may_be_table:
        raise RuleError(f"the value of {key!r} must not be a table, got {value!r}.")


def _only(said: Any, what: str, example: str) -> tuple[Any, Any]:
    """The key and the value of a table that has one."""
    if not isinstance(said, dict) or len(said) != 1:
        raise RuleError(f"{what} must be a table with one key, such as {example}, got {said!r}.")
    key, value = next(iter(said.items()))
    _check_value(key, value, may_be_table=True)
    return key, value


def _effect(said: Any) -> Effect:
    """`{name = {argument = value, …}}`, or `{name = value}` for the first argument alone, as a call has it."""
    name, given = _only(said, "effect", "{ l1 = 1e-4 }")
    definition = registry.get(name)
    if definition is None:
        raise RuleError(
            f"there is no effect {name!r}; {_nearest(name, registry)}. One of your own is there once the module that "
            "defines it is imported."
        )
    parameters = definition.__signature__.parameters
    if not parameters and given != {}:
        raise RuleError(f"{name} takes no arguments, got {given!r}. Write {name} = {{}}.")
    if not isinstance(given, dict):
        given = {next(iter(parameters)): given}
    for argument in definition.parameters:
        if argument.schema in TENSORS and (argument.name in given or argument.default is inspect.Parameter.empty):
            raise RuleError(f"{name}.{argument.name} is a tensor, and a file holds none. Make this rule in Python.")
    for key, value in given.items():
        if key not in parameters:
            raise RuleError(f"{name} has no argument {key!r}; {_nearest(key, parameters)}.")
        _check_value(f"{name}.{key}", value)
    effect: Effect = definition(**given)
    return effect


def _position(said: Any) -> Position:
    key, value = _only(said, "where", '{ before = "BatchNorm2d" }')
    if key in ("before", "after"):
        _check_value(key, value)
        return before(value) if key == "before" else after(value)
    if key == "last" and value is True:
        return last()
    if key == "not":
        return ~_position(value)
    if key in ("all", "any") and isinstance(value, list) and value:
        first, *others = map(_position, value)
        for other in others:
            first = first & other if key == "all" else first | other
        return first
    raise RuleError(
        f"where must be one of before = class, after = class, last = true, not = position, all = [position, …] and "
        f"any = [position, …], got {said!r}."
    )


def _nearest(word: object, words: Iterable[str]) -> str:
    return f"the nearest are {', '.join(map(repr, difflib.get_close_matches(str(word), words, n=3, cutoff=0)))}"


def _said(rule: Rule) -> dict[str, Any]:
    said: dict[str, Any] = {"effect": _said_of_effect(rule.effect)}
    for key, spec in KEYS.items():
        value = getattr(rule, key)
        if key != "effect" and value != spec.default:
            said[key] = _said_of(key, value)
    return said


def _said_of(key: str, value: Any) -> Any:
    if isinstance(value, Position):
        return _said_of_position(value)
    if callable(value):
        instead = "; its name selects all functions and methods that are called so" if key == "op" else ""
        raise RuleError(f"{key}={value!r} is a function, and a file holds none{instead}.")
    return _one_or_list(map(_said_of_layer, value) if key == "layer" else value)


def _said_of_layer(layer: Layer) -> str:
    if isinstance(layer, str):
        return layer
    name = class_name(layer)
    if name is None:
        raise RuleError(
            f"{layer!r} is not one of torch's classes, and a file holds names. A name, such as {layer.__name__!r}, "
            "selects all classes that are called so."
        )
    return name


def _said_of_position(position: Position) -> dict[str, Any]:
    match position:
        case Beside():
            return {position.side: _one_or_list(map(_said_of_layer, position.types))}
        case Last():
            return {"last": True}
        case Not():
            return {"not": _said_of_position(position.one)}
        case Both() | Either():
            parts = _operands(position, type(position))
            return {"all" if isinstance(position, Both) else "any": [_said_of_position(part) for part in parts]}
    raise RuleError(f"where={position!r} is a position of another kind than fxreg's own.")


def _operands(position: Position, kind: type[Both | Either]) -> Iterator[Position]:
    """`a & b & c` is `(a & b) & c`, and one list."""
    if type(position) is kind:
        yield from _operands(position.one, kind)
        yield position.other
    else:
        yield position


def _said_of_effect(effect: Effect) -> dict[str, Any]:
    definition = effect.definition
    if registry.get(effect.name) is not definition:
        raise RuleError(f"{effect!r} is of a formula that another one has replaced since, so its name says another.")
    own = [argument for argument in definition.parameters if argument.schema != "stream"]
    given = {a.name: _said_of_argument(effect, a) for a in own if not _is_default(effect, a)}
    if len(given) == 1 and own[0].is_strength and own[0].name in given:
        return {effect.name: given[own[0].name]}
    return {effect.name: given}


def _is_default(effect: Effect, argument: Argument) -> bool:
    if argument.default is inspect.Parameter.empty:
        return False
    if argument.is_strength:
        return effect.strengths[argument.name] == argument.default
    return are_equal(effect.arguments[argument.name], coerced(effect.name, argument, argument.default))


def _said_of_argument(effect: Effect, argument: Argument) -> Any:
    value: Any = effect.strengths[argument.name] if argument.is_strength else effect.arguments[argument.name]
    if isinstance(value, Tensor | ByName):
        raise RuleError(f"{argument.name} of {effect!r} is a tensor, and a file holds none.")
    return list(value) if argument.schema == "float[]" else _one_or_list(value)


def _one_or_list(value: Any) -> Any:
    """A sequence as a list, or as what is in it where that is alone; all else as it is."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return value
    found = list(value)
    return found[0] if len(found) == 1 else found
