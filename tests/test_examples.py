"""The examples that people read first do what they say: examples/quickstart.py, and the README's, output included.

`python -m tests.test_examples` writes the outputs of the README's examples into it.
"""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from examples import quickstart

README = Path(__file__).parents[1] / "README.md"
_EXAMPLE = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def with_outputs(readme: str) -> str:
    """The README with the output of each of its examples as this version prints it."""
    names: dict[str, object] = {}

    def run(example: re.Match[str]) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(example[1], names)
        return f"```python\n{example[1]}```\n\n```text\n{printed.getvalue().rstrip()}\n```"

    return _EXAMPLE.sub(run, readme)


def without_fingerprints(text: str) -> str:
    """Those of formulas depend on the version of Python."""
    return re.sub(r"\.x[0-9a-f]{8}\(", "(", text)


def test_the_readme_shows_what_its_examples_print() -> None:
    readme = README.read_text(encoding="utf-8")
    assert len(_EXAMPLE.findall(readme)) == 3
    assert without_fingerprints(with_outputs(readme)) == without_fingerprints(readme)


def test_quickstart_prints_the_plan_every_epoch_and_the_graph(capsys: pytest.CaptureFixture[str]) -> None:
    quickstart.main(["--epochs", "1", "--no-compile"])
    printed = capsys.readouterr()
    assert printed.err == ""  # no progress bar without a terminal
    assert re.search(r"^sparse +l1\(0\.002\) +conv2\.weight +32×16×3×3 +4,608 +penalty", printed.out, re.MULTILINE)
    assert len(re.findall(r"^  1  loss \d", printed.out, re.MULTILINE)) == 2
    assert re.search(
        r"^\+    conv1_weight_sparse = torch\.ops\.fxreg\.l1\..*# rule 'sparse'$", printed.out, re.MULTILINE
    )
    assert re.search(r"^with rules     loss .* sparse \d.* small \d", printed.out, re.MULTILINE)


@pytest.fixture(scope="module")
def without() -> list[quickstart.Epoch]:
    return quickstart.train([], epochs=6, compiled=False)


def test_rules_make_weights_sparse_and_leave_the_model_accurate(without: list[quickstart.Epoch]) -> None:
    under = quickstart.train(quickstart.RULES, epochs=6, compiled=False)
    for history in (without, under):
        assert history[-1].loss < 0.2 * history[0].loss
        assert history[-1].accuracy > 0.9
    assert without[-1].sparsity < 0.05
    assert under[-1].sparsity > 0.3
    assert without[-1].penalties == {}
    assert under[-1].penalties.keys() == {"sparse", "small"}


def test_quickstart_repeats_itself(without: list[quickstart.Epoch]) -> None:
    torch.manual_seed(1)  # whatever happened before
    assert quickstart.train([], epochs=6, compiled=False) == without


@pytest.mark.slow
def test_quickstart_compiles_once_through_its_strength_schedule() -> None:
    with torch._dynamo.config.patch(error_on_recompile=True):
        history = quickstart.train(quickstart.RULES, epochs=6)
    assert history[-1].loss < 0.2 * history[0].loss
    assert history[-1].accuracy > 0.9
    assert history[-1].sparsity > 0.3


if __name__ == "__main__":
    README.write_text(with_outputs(README.read_text(encoding="utf-8")), encoding="utf-8")
