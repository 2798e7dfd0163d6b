"""Text and plain data: TOML, YAML and JSON, by a file's suffix. What a format would take and lose is refused."""

import json
import os
import re
import tomllib
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import FxregError, RuleError

# The numbers of YAML 1.2, in which 1e-4 is one. Text that looks like one is quoted when it is written.
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, object] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{f"{sign}.{word}": float(f"{sign}inf") for sign in ("", "+", "-") for word in ("inf", "Inf", "INF")},
}
_YAML = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class _Format:
    name: str
    read: Callable[[str], Any]
    write: Callable[[Any], str]


def read(path: str | os.PathLike[str]) -> Any:
    """The data in a file.

    Raises:
        RuleError: no such file, another suffix, or text that is not in the format of its suffix.
        FxregError: a package is lacking.
    """
    file = Path(path)
    form = _format(file)
    try:
        return form.read(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RuleError(f"{file}: cannot be read: {error.strerror or error}. Mend the path.") from None
    except (ValueError, RecursionError) as error:
        raise RuleError(f"{file}: this is not {form.name}: {error}.") from None


def write(data: Any, path: str | os.PathLike[str]) -> None:
    """Write data to a file, all of it or nothing.

    Raises:
        RuleError: another suffix, a value that the format has no word for, or a file that cannot be written.
        FxregError: a package is lacking.
    """
    file = Path(path)
    form = _format(file)
    try:
        text = form.write(data).encode()
    except ValueError as error:
        raise RuleError(f"{file}: {form.name} cannot hold this: {error}.") from None
    try:
        file.write_bytes(text)
    except OSError as error:
        raise RuleError(f"{file}: cannot be written: {error.strerror or error}. Mend the path.") from None


def _format(file: Path) -> _Format:
    form = _FORMATS.get(file.suffix.lower())
    if form is None:
        raise RuleError(f"a rules file must end in {', '.join(_FORMATS)}, got {str(file)!r}.")
    return form


@contextmanager
def _from(extra: str, what: str) -> Iterator[None]:
    """Where what comes with an extra is imported."""
    try:
        yield
    except ImportError as error:
        raise FxregError(f"{what} needs the package {error.name!r}: pip install 'fxreg[{extra}]'.") from None


def _write_toml(data: Any) -> str:
    with _from("toml", "writing TOML"):
        import tomli_w
    return tomli_w.dumps(data)


def _read_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_repetition, parse_constant=_refuse_constant)


def _write_json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"JSON has no {word}, which TOML and YAML have")


def _read_yaml(text: str) -> Any:
    with _from("yaml", "reading YAML"):
        import yaml
    try:  # a tree without meanings: those of PyYAML's own are of YAML 1.1, in which the key `on` says True
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        return None if node is None else _yaml_value(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _yaml_value(node: Any) -> Any:
    line = f"line {node.start_mark.line + 1}"
    if node.tag == f"{_YAML}map":
        keys = [_yaml_value(key) for key, _ in node.value]
        if not all(isinstance(key, Hashable) for key in keys):
            raise ValueError(f"a key that is no text, at {line}")
        return _without_repetition(zip(keys, (_yaml_value(value) for _, value in node.value), strict=True))
    if node.tag == f"{_YAML}seq":
        return [_yaml_value(one) for one in node.value]
    if node.tag != f"{_YAML}str":
        raise ValueError(f"the tag {node.tag!r} at {line} says nothing here; leave it out")
    if node.style is not None:  # in quotes, or a block
        return node.value
    if node.value in _WORDS:
        return _WORDS[node.value]
    if _INTEGER.fullmatch(node.value):
        return int(node.value)
    return float(node.value) if _FLOAT.fullmatch(node.value) else node.value


def _write_yaml(data: Any) -> str:
    with _from("yaml", "writing YAML"):
        import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes what looks like a number in YAML 1.1 or 1.2."""

    Dumper.add_implicit_resolver(f"{_YAML}float", re.compile(f"(?:{_FLOAT.pattern})$"), list("-+.0123456789"))
    text: str = yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def _without_repetition(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A table; of a key that comes twice, one value would be lost."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} comes twice in one table")
        found[key] = value
    return found


_FORMATS = {
    ".toml": _Format("TOML", tomllib.loads, _write_toml),
    ".yaml": _Format("YAML", _read_yaml, _write_yaml),
    ".yml": _Format("YAML", _read_yaml, _write_yaml),
    ".json": _Format("JSON", _read_json, _write_json),
}
