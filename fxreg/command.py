"""The command line: `fxreg explain|diff|draw|check --model package.module:factory --rules rules.toml`."""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, get_args

from torch import nn
from torch.export import ExportedProgram

from .classes import is_dotted
from .drawing import draw
from .errors import FxregError
from .planning import Emit
from .reporting import diff, explain
from .transforming import transform

_COMMANDS = {
    "explain": "print what the rules would do, which captures and changes nothing",
    "diff": "print the code that the rules insert into the model's",
    "draw": "write a picture of the graph with the rules in it",
    "check": "carry the rules out, verify the result with --inputs, and print what was done",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, or 1 after an error of fxreg's, which is printed; usage errors exit with 2."""
    options = _parser().parse_args(argv)
    try:
        _run(options)
    except FxregError as error:
        print(f"fxreg {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fxreg", description="Regularize a model by the rules in a file.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in _COMMANDS.items():
        one = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        one.add_argument(
            "--model",
            required=True,
            metavar="package.module:factory",
            help="what returns the model when it is called without arguments, or the model; found from this directory",
        )
        one.add_argument("--rules", required=True, metavar="FILE", help="a .toml, .yaml, .yml or .json file")
        if name != "explain":
            one.add_argument("--emit", choices=get_args(Emit), default="backward", help="where the penalty goes")
            one.add_argument(
                "--inputs",
                metavar="package.module:factory",
                help="what returns example inputs, a tuple or a dict: with them the result is verified",
            )
        if name == "draw":
            one.add_argument("path", help="the file to write: .svg, .html or .dot")
    return parser


def _run(options: argparse.Namespace) -> None:
    model = _made(options.model, "--model")  # first: its module may define effects that the rules name
    if options.command == "explain":
        print(explain(model, options.rules))
        return
    inputs = None if options.inputs is None else _made(options.inputs, "--inputs")
    gm = transform(model, options.rules, example_inputs=inputs, emit=options.emit)
    match options.command:
        case "diff":
            print(diff(gm))
        case "draw":
            draw(gm, options.path)
        case "check":
            print(explain(gm))


def _made(reference: str, flag: str) -> Any:
    """What a factory in a module returns; what is no factory is the thing itself."""
    module_name, colon, path = reference.partition(":")
    if not (colon and is_dotted(module_name) and is_dotted(path)):
        raise FxregError(f"{flag}: expected package.module:factory, got {reference!r}.")
    if os.getcwd() not in sys.path:  # as `python -m` has it
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # of something that the module itself imports
        raise FxregError(
            f"{flag} {reference}: there is no module {error.name!r} in {os.getcwd()} or among what is installed. Mend "
            "the name, or run fxreg in the directory that it is in."
        ) from None
    for part in path.split("."):
        if not hasattr(found, part):
            near = ", ".join(map(repr, difflib.get_close_matches(part, dir(found), n=3, cutoff=0)))
            raise FxregError(f"{flag} {reference}: there is no {part!r}; the nearest are {near}.")
        found = getattr(found, part)
    return found() if callable(found) and not isinstance(found, nn.Module | ExportedProgram) else found
