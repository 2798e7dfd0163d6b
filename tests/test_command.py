"""The command line does what the calls do, and says what goes wrong in a line."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxreg
from fxreg.command import main
from fxreg.effects import registry

MODULE = """
import torch, fxreg
from torch import nn

@fxreg.penalty
def command_sum(weight: torch.Tensor) -> torch.Tensor:
    return weight.sum()

def make():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

class Net(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)

made = make()
class nested:
    make = staticmethod(make)
inputs = (torch.ones(5, 3),)
text = "text"
def named():
    return {"input": torch.ones(5, 3)}
def wrong():
    return (torch.ones(5, 7),)
def broken():
    raise RuntimeError("of its own")
"""
RULES = '[[rules]]\neffect.l1 = 0.25\nlayer = "Linear"\nparam = "weight"\nlabel = "sparse"\n'


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a package and rules, in which the command is run."""
    (tmp_path / "command_case").mkdir()
    (tmp_path / "command_case" / "models.py").write_text(MODULE)
    (tmp_path / "command_case" / "lacking.py").write_text("import no_such_module_at_all\n")
    (tmp_path / "rules.toml").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != os.getcwd()])
    for name in [name for name in sys.modules if name.startswith("command_case")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(registry, "command_sum", raising=False)
    return tmp_path


def run(command: str, *more: str, model: str = "command_case.models:make", rules: str = "rules.toml") -> int:
    return main([command, "--model", model, "--rules", rules, *more])


def model_and_rule() -> tuple[nn.Module, fxreg.Rule]:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return model, fxreg.Rule(fxreg.l1(0.25), layer="Linear", param="weight", label="sparse")


@pytest.mark.parametrize("model", ["make", "made", "nested.make"])
def test_explain_prints_the_plan_and_captures_nothing(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxreg.command.transform", None)
    assert run("explain", model=f"command_case.models:{model}") == 0
    assert capsys.readouterr().out == f"{fxreg.explain(*model_and_rule())}\n"


def test_a_class_is_a_factory(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", model="command_case.models:Net") == 0
    assert "2×3" in capsys.readouterr().out


@pytest.mark.parametrize("emit", ["backward", "output"])
def test_diff_prints_the_code(emit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("diff", "--emit", emit) == 0
    model, rule = model_and_rule()
    assert capsys.readouterr().out == f"{fxreg.diff(fxreg.transform(model, rule, emit=emit))}\n"


@pytest.mark.parametrize("suffix", [".svg", ".html", ".dot"])
def test_draw_writes_the_picture(suffix: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("draw", f"graph{suffix}") == 0
    fxreg.draw(fxreg.transform(*model_and_rule()), here / f"wanted{suffix}")
    assert (here / f"graph{suffix}").read_text() == (here / f"wanted{suffix}").read_text()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("inputs", ["inputs", "named"])
def test_check_verifies_with_inputs(inputs: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "--inputs", f"command_case.models:{inputs}") == 0
    model, rule = model_and_rule()
    gm = fxreg.transform(model, rule, example_inputs=(torch.ones(5, 3),))
    printed = capsys.readouterr().out
    assert printed == f"{fxreg.explain(gm)}\n"
    assert printed.endswith("\nverified against the model\n")


def test_check_says_that_it_did_not_verify_without(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check") == 0
    assert capsys.readouterr().out.endswith("\nnot verified: no example_inputs were given\n")


def test_check_fails_where_verifying_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise fxreg.VerifyError("the output differs.")

    monkeypatch.setattr("fxreg.transforming.verified", refuse)
    assert run("check", "--inputs", "command_case.models:inputs") == 1
    assert capsys.readouterr() == ("", "fxreg check: the output differs.\n")


def test_effects_of_the_models_module_are_there_when_the_rules_are_read(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "own.toml").write_text("[[rules]]\neffect.command_sum = 0.5\n")
    assert run("explain", rules="own.toml") == 0
    assert "command_sum(0.5)" in capsys.readouterr().out


WRONG = {
    "no rules": ({"rules": "none.toml"}, ("none.toml", "cannot be read")),
    "no module": ({"model": "command_case.nets:make"}, ("--model", "no module 'command_case.nets'", "Mend")),
    "no package": ({"model": "no_such_package.a.b:make"}, ("no module 'no_such_package'",)),
    "no factory": ({"model": "command_case.models:maek"}, ("no 'maek'", "'make'")),
    "no attribute": ({"model": "command_case.models:nested.maek"}, ("no 'maek'", "'make'")),
    "no colon": (
        {"model": "command_case.models.make"},
        ("expected package.module:factory", "models.make"),
    ),
    "relative": ({"model": ".models:make"}, ("expected package.module:factory",)),
    "no model": ({"model": "command_case.models:text"}, ("must be an nn.Module",)),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("command", ["explain", "check"])
def test_what_goes_wrong_is_said_in_a_line(command: str, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    changed, words = WRONG[case]
    assert run(command, **changed) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"fxreg {command}: ")
    assert printed.err.count("\n") == 1
    for word in words:
        assert word in printed.err


def test_rules_that_match_nothing_and_other_suffixes_fail(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "none.toml").write_text('[[rules]]\neffect.l1 = 0.1\nlayer = "Conv2d"\n')
    for command, more in (("explain", ()), ("diff", ()), ("draw", ("graph.svg",)), ("check", ())):
        assert run(command, *more, rules="none.toml") == 1
        assert "matched no parameter" in capsys.readouterr().err
    assert run("draw", "graph.png") == 1
    assert "must end in .dot, .svg, .html" in capsys.readouterr().err
    assert not list(here.glob("graph.*"))


def test_what_the_users_own_code_raises_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="of its own"):
        run("explain", model="command_case.models:broken")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        run("explain", model="command_case.lacking:make")


@pytest.mark.parametrize(
    "arguments",
    [[], ["explain"], ["explain", "--model", "a:b"], ["paint"], ["draw", "--model", "a:b", "--rules", "c.toml"]],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: fxreg" in capsys.readouterr().err


def test_the_entry_point_is_the_command() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"fxreg": "fxreg.command:main"}


@pytest.mark.slow
def test_python_runs_it_as_a_module(here: Path) -> None:
    paths = {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "fxreg", "explain", "--model", "command_case.models:make", "--rules", "none.toml"]
    done = subprocess.run(command, cwd=here, env=os.environ | paths, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("fxreg explain: none.toml: cannot be read")
