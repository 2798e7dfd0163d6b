"""An operator's name says what it computes: compiled code of another formula, helper or version is never served."""

import os
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.utils import fresh_cache

import fxreg
from fxreg import defining, operators, packages
from fxreg.fingerprints import NUMERICS, Fingerprint
from fxreg.packages import edition

from .test_registry import EXAMPLES, WAYS, aot_eager, eager, func_grad, loss_of, net

FORMULA = """
import fxreg, torch
from torch import Tensor

@fxreg.penalty
def fingerprints_cell(weight: Tensor) -> Tensor:
    return {}
"""


def compiled_grad(gm: nn.Module, x: torch.Tensor) -> Any:
    torch._dynamo.reset()
    return torch.compile(func_grad, backend="aot_eager")(gm, x)


@pytest.fixture
def cell(request: pytest.FixtureRequest) -> Iterator[types.ModuleType]:
    """A user's module, with another one that it can import."""
    module, other = types.ModuleType("fingerprints_user"), types.ModuleType("fingerprints_other")
    sys.modules.update({module.__name__: module, other.__name__: other})
    vars(module)["other"] = other
    yield module
    del sys.modules[module.__name__], sys.modules[other.__name__]


def run(module: types.ModuleType, source: str) -> None:
    exec(compile(source, "<cell>", "exec"), vars(module))


# A formula, what is below it, what is run later, and the factor of Σw before and after.
CHANGES = {
    "a function": ("twice(weight)", "twice = lambda w: 2 * w.sum()", "twice = lambda w: 3 * w.sum()", 2, 3),
    "a function's function": (
        "outer(weight)",
        "def outer(w): return inner(w)\ndef inner(w): return w.sum()",
        "def inner(w): return -w.sum()",
        1,
        -1,
    ),
    "functions that call each other": (
        "down(weight, 2)",
        "def down(w, n): return up(w, n) if n else w.sum()\ndef up(w, n): return 2 * down(w, n - 1)",
        "def up(w, n): return 3 * down(w, n - 1)",
        4,
        9,
    ),
    "a constant": ("RATE * weight.sum()", "RATE = 2.0", "RATE = 2.5", 2, 2.5),
    "in a nested function": ("(lambda: RATE * weight.sum())()", "RATE = 2.0", "RATE = 2.5", 2, 2.5),
    "a dict": ("TABLE['a'] * weight.sum()", "TABLE = {'a': 2.0}", "TABLE['a'] = 3.0", 2, 3),
    "a function in a dict": (
        "TABLE['a'](weight)",
        "TABLE = {'a': torch.sum}",
        "TABLE['a'] = lambda w: -w.sum()",
        1,
        -1,
    ),
    "a list in a tuple": ("LIST[0][0] * weight.sum()", "LIST = ([2.0],)", "LIST[0][0] = 3.0", 2, 3),
    "a set": ("len(SET) * weight.sum()", "SET = {'a', 'b'}", "SET.add('c')", 2, 3),
    "a tensor": ("(EYE * weight).sum()", "EYE = torch.ones(4, 4)", "EYE.fill_(3.0)", 1, 3),
    "a dtype": ("weight.to(WIDE).sum()", "WIDE = torch.float32", "WIDE = torch.float64", 1, 1),
    "an attribute of a module": ("other.f(weight)", "other.f = torch.sum", "other.f = lambda w: -w.sum()", 1, -1),
    "a constant of a module": ("other.RATE * weight.sum()", "other.RATE = 2.0", "other.RATE = 3.0", 2, 3),
    "what the formula imports": (
        "__import__('operator').mul(lazily(), weight.sum())",
        "other.RATE = 2.0\ndef lazily():\n    from fingerprints_other import RATE\n    return RATE",
        "other.RATE = 3.0",
        2,
        3,
    ),
    "a partial": (
        "scaled(weight).sum()",
        "from functools import partial\nscaled = partial(torch.mul, 2.0)",
        "scaled = partial(torch.mul, 3.0)",
        2,
        3,
    ),
    "a cached function": (
        "rate() * weight.sum()",
        "import functools\n@functools.cache\ndef rate(): return 2.0",
        "@functools.cache\ndef rate(): return 3.0",
        2,
        3,
    ),
    "a decorated function": (
        "summed(weight)",
        "@torch.enable_grad()\ndef summed(w): return w.sum()",
        "@torch.enable_grad()\ndef summed(w): return -w.sum()",
        1,
        -1,
    ),
    "a default": ("summed(weight)", "def summed(w, by=2): return by * w.sum()", "summed.__defaults__ = (3,)", 2, 3),
    "an attribute of a function": ("f.by * weight.sum()", "def f(): ...\nf.by = 2", "f.by = 3", 2, 3),
    "a method": (
        "K().f(weight)",
        "class K:\n    def f(self, w): return w.sum()",
        "K.f = lambda self, w: -w.sum()",
        1,
        -1,
    ),
    "an inherited method": (
        "K().f(weight)",
        "class B:\n    def f(self, w): return w.sum()\nclass K(B): ...",
        "B.f = lambda self, w: -w.sum()",
        1,
        -1,
    ),
    "a constant of a class": ("K.by * weight.sum()", "class K:\n    by = 2", "K.by = 3", 2, 3),
    "a dict's default": (
        "TABLE.default_factory() * weight.sum()",
        "from collections import defaultdict\nTABLE = defaultdict(lambda: 2.0)",
        "TABLE = defaultdict(lambda: 3.0)",
        2,
        3,
    ),
    "a dict of one's own": (
        "TABLE.by() * weight.sum()",
        "class K(dict):\n    items = None\n    def by(self): return self['a'] * 2\nTABLE = K(a=1.0)",
        "K.by = lambda self: 3.0",
        2,
        3,
    ),
    "an object": (
        "K.by * weight.sum()",
        "from types import SimpleNamespace\nK = SimpleNamespace(by=2)",
        "K.by = 3",
        2,
        3,
    ),
    "a member of an enumeration": (
        "K.by.value * weight.sum()",
        "import enum\nclass K(enum.Enum):\n    by = 2",
        "class K(enum.Enum):\n    by = 3",
        2,
        3,
    ),
    "another effect": (
        "later.function(weight)",
        "@fxreg.penalty\ndef later(weight: Tensor) -> Tensor: return weight.sum()",
        "@fxreg.penalty\ndef later(weight: Tensor) -> Tensor: return -weight.sum()",
        1,
        -1,
    ),
    "a builtin that is hidden": ("abs(weight.sum())", "abs = lambda x: x", "abs = lambda x: -x", 1, -1),
    "what cannot be pickled": (
        "RATE() * weight.sum()",
        "RATE = (lambda n: type('R', (), {'__call__': lambda self: n, '__reduce_ex__': None}))(2)()",
        "RATE = (lambda n: type('R', (), {'__call__': lambda self: n, '__reduce_ex__': None}))(3)()",
        2,
        3,
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_formula_reads_is_part_of_its_operators_name(name: str, cell: types.ModuleType) -> None:
    formula, below, change, before, after = CHANGES[name]
    run(cell, FORMULA.format(formula))
    run(cell, below)
    model, x = net()
    plain = eager(model, x)["first.weight"]
    names = []
    for source, factor in (("", before), (change, after), ("", after)):
        run(cell, source)
        gm = fxreg.transform(model, fxreg.Rule(cell.fingerprints_cell(1.0), name="first", param="weight"))
        torch.testing.assert_close(eager(gm, x)["first.weight"] - plain, torch.full((4, 4), float(factor)))
        (node,) = (n for n in gm.graph.nodes if str(n.target).startswith("fxreg.fingerprints_cell.x"))
        names.append(str(node.target))
    assert names[0] != names[1] == names[2]


SAME = {
    "the same function once more": (
        "f(weight)",
        "def f(w): return w.sum()",
        "\n\ndef f(w):  # a note\n    return w.sum()",
    ),
    "a docstring": ("f(weight)", "def f(w): return w.sum()", "def f(w):\n    'Sum.'\n    return w.sum()"),
    "what no code names": ("weight.sum()", "RATE = 2.0", "RATE = 3.0"),
    "an attribute that no code names": ("other.f(weight)", "other.f = torch.sum", "other.rate = 3.0"),
    "a cache that is filled": (
        "f(weight)",
        "CACHE = {}\ndef f(w):\n    CACHE[len(CACHE)] = 1\n    return w.sum()",
        "CACHE[3] = 2",
    ),
    "a log": ("f(weight)", "LOG = []\ndef f(w): LOG.append(1); return w.sum()", "LOG.append(2)"),
    "a counter": ("f(weight)", "n = 0\ndef f(w):\n    global n\n    n += 1\n    return w.sum()", "n = 7"),
    "a set of another order": ("len(S) * weight.sum()", "S = {0, 8}", "S = {8, 0}"),
}


@pytest.mark.parametrize("name", SAME)
def test_what_a_formula_does_not_read_is_not_part_of_its_name(name: str, cell: types.ModuleType) -> None:
    formula, below, change = SAME[name]
    run(cell, FORMULA.format(formula))
    run(cell, below)
    names = []
    for source in ("", change):
        run(cell, source)
        fxreg.transform(nn.Linear(2, 2), fxreg.Rule(cell.fingerprints_cell(1.0)))(torch.ones(1, 2)).sum().backward()
        names.append(cell.fingerprints_cell.fingerprint)
    assert names[0] == names[1]


def test_a_method_that_is_no_puts_hides_nothing(cell: types.ModuleType) -> None:
    """`add` is a set's, and a tensor's."""
    run(cell, FORMULA.format("(f(weight).add(1) + TABLE.get('a').add(1) + weight[0][0].add(1)).sum()"))
    names = []
    for factor in (2, 3, 4):
        run(cell, f"f = lambda w: {min(factor, 3)} * w.sum()\nTABLE = {{'a': torch.tensor({factor})}}")
        cell.fingerprints_cell.refresh()
        names.append(cell.fingerprints_cell.fingerprint)
    assert len(set(names)) == 3


def test_functions_are_followed_as_deep_as_they_go(cell: types.ModuleType) -> None:
    run(cell, FORMULA.format("f0(weight)"))
    run(cell, "\n".join(f"def f{k}(w): return f{k + 1}(w)" for k in range(1000)) + "\ndef f1000(w): return w.sum()")
    names = []
    for change in ("", "def f1000(w): return -w.sum()"):
        run(cell, change)
        cell.fingerprints_cell.refresh()
        names.append(cell.fingerprints_cell.fingerprint)
    assert names[0] != names[1]


def test_what_is_installed_is_known_by_its_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert edition("torch.nn.functional") == edition("json") == edition("builtins") == edition("fxreg.norms") == ""
    own = edition("networkx.classes")
    assert own
    assert own == edition("networkx")
    assert own not in (edition("numpy.random"), edition(__name__), edition("__main__"))
    assert edition(__name__) is None
    shadowing = types.ModuleType("colorsys")  # a user's file under the name of one of Python's
    shadowing.__file__ = str(tmp_path / "colorsys.py")
    monkeypatch.setitem(sys.modules, "colorsys", shadowing)
    assert edition("colorsys") is None
    read = metadata.PathDistribution.read_text
    monkeypatch.setattr(metadata.PathDistribution, "read_text", lambda self, name: f"{read(self, name)}\n")
    packages._record.cache_clear()
    try:
        assert edition("networkx") not in ("", None, own)
    finally:
        packages._record.cache_clear()


def test_formulas_that_did_not_fit_are_tried_again_when_they_mean_something_else(cell: types.ModuleType) -> None:
    run(cell, FORMULA.format("helper(weight)"))
    run(cell, "def helper(w): return w")
    rule = fxreg.Rule(cell.fingerprints_cell(1.0))
    with pytest.raises(fxreg.RuleError, match="must be 0-d"):
        fxreg.transform(nn.Linear(2, 2), rule)
    run(cell, "def helper(w): return w.sum()")
    fxreg.transform(nn.Linear(2, 2), rule)


def test_a_transform_asks_once_what_an_effect_means(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    meaning = type(fxreg.l1)._meaning
    monkeypatch.setattr(type(fxreg.l1), "_meaning", lambda self: asked.append(self.name) or meaning(self))
    rules = [fxreg.Rule(fxreg.l1(0.1), param="weight"), fxreg.Rule(fxreg.l1(0.2), param="bias")]
    fxreg.transform(nn.Sequential(*(nn.Linear(2, 2) for _ in range(20))), rules)
    assert asked == ["l1"]


@pytest.mark.slow
def test_new_code_is_not_compiled_under_an_old_name(cell: types.ModuleType) -> None:
    """It would be kept on disk, and served to whoever has the old code."""
    run(cell, FORMULA.format("helper(weight)"))
    run(cell, "def helper(w): return w.sum()")
    model, x = net()
    rule = fxreg.Rule(cell.fingerprints_cell(1.0), name="first", param="weight")
    gm = fxreg.transform(model, rule)
    run(cell, "def helper(w): return 3 * w.sum()")
    with pytest.raises(Exception, match=r"'fingerprints_cell': a function that its formula calls, or a constant"):
        aot_eager(gm, x)
    plain = eager(model, x)["first.weight"]
    for run_by, one in ((eager, gm), (aot_eager, fxreg.transform(model, rule))):
        torch.testing.assert_close(run_by(one, x)["first.weight"] - plain, torch.full((4, 4), 3.0))


COMPILED = {
    "tensors": ("len(TABLE) * weight.sum()", "TABLE = [torch.ones(2), torch.nn.Parameter(torch.ones(2))]", 2),
    "a log": ("2 * f(weight)", "LOG = []\ndef f(w): LOG.append(1); return w.sum()", 2),
    "an object": ("K.by * weight.sum()", "from types import SimpleNamespace\nK = SimpleNamespace(by=2)", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("context", [aot_eager, compiled_grad])
@pytest.mark.parametrize("name", COMPILED)
def test_what_has_not_changed_compiles(name: str, context: Any, cell: types.ModuleType) -> None:
    formula, below, factor = COMPILED[name]
    run(cell, FORMULA.format(formula))
    run(cell, below)
    model, x = net()
    plain = eager(model, x)["first.weight"]
    gm = fxreg.transform(model, fxreg.Rule(cell.fingerprints_cell(1.0), name="first", param="weight"))
    eager(gm, x)
    for _ in range(2):
        torch.testing.assert_close(context(gm, x)["first.weight"] - plain, torch.full((4, 4), float(factor)))


@pytest.mark.slow
def test_an_emitted_module_compiles_after_its_formula_got_a_gradient(cell: types.ModuleType) -> None:
    """Its operator goes on with the formula as it was."""
    run(cell, FORMULA.format("weight.square().sum()"))
    model, x = net()
    gm = fxreg.transform(model, fxreg.Rule(cell.fingerprints_cell(1.0), param="weight"))
    expected = eager(gm, x)["first.weight"]
    run(cell, "@fingerprints_cell.gradient\ndef _(weight): return 7 * weight")
    torch.testing.assert_close(aot_eager(gm, x)["first.weight"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("via", ["penalty", "gradient"])
def test_inductor_compiles_anew_what_calls_another_helper(via: Any, cell: types.ModuleType) -> None:
    run(cell, FORMULA.format("helper(weight)") + "@fingerprints_cell.gradient\ndef _(w): return slope(w)")
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    with fresh_cache():
        for helper, slope in (("w.square()", "2 * w"), ("w.square() * w", "3 * w.square()")):
            run(cell, f"def helper(w): return ({helper}).sum()\ndef slope(w): return {slope}")
            torch._dynamo.reset()
            gm = fxreg.transform(model, fxreg.Rule(cell.fingerprints_cell(0.5), param="weight", via=via))
            (actual,) = torch.autograd.grad(loss_of(torch.compile(gm)(x)), [model.weight])
            w = model.weight
            loss = loss_of(model(x)) + 0.5 * (w**2 if helper == "w.square()" else w**3).sum()
            torch.testing.assert_close(actual, *torch.autograd.grad(loss, [w]))


USER = """
import collections, enum, functools, math, os, re, types
import fxreg, networkx, numpy, torch
from torch import Tensor

@fxreg.penalty
def fingerprints_many(weight: Tensor) -> Tensor:
    names = [DTYPE, DEVICE, SET, FROZEN, TABLE, PARTIAL, PATTERN, KINDS, ORDERED, PROXY, PARAMETER, MODULE, SIZE]
    names += [networkx.shortest_path, numpy.float32, ARRAY, custom]
    if weight.device.type in {"cpu", "cuda", "mps", "xpu"}:
        names.append(lambda: weight)
    return rate() * decorated(weight) + Holder().f(weight) + math.sin(0.0) * len(names) + fxreg.l1.function(weight)

DTYPE, DEVICE, SIZE = torch.float64, torch.device("cpu"), torch.Size([2])
SET, FROZEN = {"a", "b", "c", "d"}, frozenset({("x", 1), ("y", 2), ("z", 3)})
TABLE = {"sum": torch.sum, "abs": Tensor.abs, "own": lambda w: w, "add": torch.ops.aten.add}
PARTIAL, PATTERN, PROXY = functools.partial(torch.mul, 2.0), re.compile("a+"), types.MappingProxyType({"a": 1})
ORDERED = collections.OrderedDict(a=1)
PARAMETER, MODULE = torch.nn.Parameter(torch.ones(2)), torch.nn.Linear(2, 2, device="meta")
ARRAY = numpy.arange(3.0)
@torch.library.custom_op("fingerprints::custom", mutates_args=())
def custom(w: Tensor) -> Tensor: return w.clone()
class KINDS(enum.Enum):
    A, B = 1, 2
@functools.lru_cache
def rate(): return 2.0
@torch.enable_grad()
def decorated(w): return w.sum()
class Holder:
    __slots__ = ("a",)
    def f(self, w): return w.mean() if os.path.sep else w.sum()
    @property
    def g(self): return self.a
"""

FIRST = """
import pickle, sys, torch, fxreg, user
effect = user.fingerprints_many(0.5)
early = pickle.dumps(effect)
gm = fxreg.transform(torch.nn.Linear(2, 2), fxreg.Rule(effect))
gm(torch.ones(1, 2)).sum().backward()
pickle.dump((early, pickle.dumps(gm)), open(sys.argv[1], "wb"))
"""

SECOND = """
import pickle, sys, torch, fxreg, user
early, gm = pickle.load(open(sys.argv[1], "rb"))
pickle.loads(gm)(torch.ones(1, 2)).sum().backward()
pickle.loads(early)
user.decorated = lambda w: 2 * w.sum()
for pickled in (early, gm):
    try:
        pickle.loads(pickled)
    except fxreg.RuleError as error:
        print(error)
"""


@pytest.mark.slow
def test_pickles_load_where_everything_means_the_same_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    _child(FIRST, tmp_path, str(tmp_path / "pickle"), seed="1")
    found = _child(SECOND, tmp_path, str(tmp_path / "pickle"), seed="2").splitlines()
    assert len(found) == 2
    for line in found:
        assert line.startswith("unpickling effect 'fingerprints_many': it has another formula, or its formula uses")


def _child(code: str, path: Path, *arguments: str, seed: str = "0") -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(path), os.getcwd())), "PYTHONHASHSEED": seed}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        cwd=path.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


# What is fxreg's own.

SHOW = """
import fxreg
from fxreg.operators import attach, drawn, total
print(fxreg.__file__, attach, total, drawn, fxreg.l1.operator)
"""


@pytest.mark.slow
def test_every_operator_has_the_numerics_in_its_name(tmp_path: Path) -> None:
    """Also where the package is an archive without files."""
    package = Path(fxreg.__file__).parent
    own = f"{operators.attach} {operators.total} {operators.drawn} {fxreg.l1.operator}".split()
    archive = tmp_path / "archived" / "fxreg.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as written:
        for path in package.glob("*.py"):
            written.write(path, f"fxreg/{path.name}")
    file, *same = _child(SHOW, archive).split()
    assert Path(file).parent.parent == archive
    assert same == own
    shutil.copytree(package, tmp_path / "edited" / "fxreg", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "edited" / "fxreg" / "norms.py").open("a") as norms:
        norms.write("\n\ndef added() -> None:\n    pass\n")
    file, *other = _child(SHOW, tmp_path / "edited").split()
    assert Path(file).parent.parent == tmp_path / "edited"
    assert not {*other} & {*own}


@pytest.mark.slow
def test_what_runs_inside_operators_is_in_their_names() -> None:
    """Of every effect, forward and backward: whatever is called from the files that have them all."""
    package, found = Path(operators.__file__).parent, set[str]()
    begin = {Path(defining.__file__), Path(operators.__file__)}
    depth = 0

    def profile(frame: types.FrameType, event: str, _: object) -> None:
        nonlocal depth
        path = Path(frame.f_code.co_filename)
        if event in ("call", "return") and path in begin:
            depth += 1 if event == "call" else -1
        if event == "call" and depth and path.parent == package:
            found.add(path.stem)

    for name, via in WAYS:
        model, x = net()
        gm = fxreg.transform(model, fxreg.Rule(EXAMPLES[name].effect, param="weight", via=via))
        sys.setprofile(profile)
        try:
            loss_of(gm(x)).backward()
        finally:
            sys.setprofile(None)
    assert depth == 0
    assert (
        {"defining", "operators", "formulas", "effects", "joining", "norms", "hashing", "groups"}
        <= found
        <= {*NUMERICS}
    )


def test_a_fingerprint_is_an_identifier_and_tells_kinds_apart() -> None:
    values = [
        1,
        1.0,
        True,
        "1",
        b"1",
        (1,),
        [1],
        {1},
        {1: 1},
        None,
        ((1,), ()),
        ((1, ()),),
        1j,
        -0.0,
        0.0,
        "",
        ("", ""),
    ]
    found = {Fingerprint(value) for value in values}
    assert len(found) == len(values)
    assert all(one.isidentifier() and len(one) == 9 for one in found)
