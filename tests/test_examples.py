"""The examples that people read first do what they say: those in examples/, shortened, and the README's, output
included.

`python -m tests.test_examples` writes the outputs of the README's examples into it.
"""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from examples import autoencoder, filters, finetuning, quickstart, sparse_features

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
    assert len(_EXAMPLE.findall(readme)) == 4
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


@pytest.mark.slow
def test_filters_of_zeros_are_counted_and_cut_out_without_a_difference(capsys: pytest.CaptureFixture[str]) -> None:
    filters.main(["--epochs", "10", "--strength", "0.03", "--no-compile"])
    printed = capsys.readouterr().out
    found = re.search(r"^group lasso +(\d+) of 16 +(\d+) of 32 +6,042 +(\S+)%$", printed, re.MULTILINE)
    cut = re.search(r"^filters of zeros cut out +(\d+) of 16 +(\d+) of 32 +([\d,]+) +(\S+)%$", printed, re.MULTILINE)
    assert found
    assert cut
    assert re.search(r"^without rules +16 of 16 +32 of 32 +6,042 +[89]\d\.\d%$", printed, re.MULTILINE)
    first, second = int(cut[1]), int(cut[2])
    assert found.groups()[:2] == cut.groups()[:2]
    assert 0 < first < 16
    assert 0 < second < 32
    assert cut[3] == f"{9 * first + 9 * first * second + 40 * second + 10:,}"
    assert found[3] == cut[4]
    assert float(cut[4]) > 70
    difference = re.search(r"outputs differ by (\S+)\.$", printed, re.MULTILINE)
    assert difference
    assert float(difference[1]) < 1e-4


def test_a_network_without_any_filter_left_is_cut_too() -> None:
    model = filters.CNN()
    for conv in (model.conv1, model.conv2):
        torch.nn.init.zeros_(conv.weight)
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(filters.cut(model)(images), model(images))


@pytest.mark.slow
def test_the_features_that_are_chosen_are_those_of_lasso(capsys: pytest.CaptureFixture[str]) -> None:
    sparse_features.main(["--steps", "300"])
    printed = capsys.readouterr().out
    rows = re.findall(r"^ +(\d+) +(\d+) +(\d+) +(yes|no) +(\S+) +(\S+)%$", printed, re.MULTILINE)
    assert [(int(row[0]), row[3]) for row in rows] == [(20, "yes"), (10, "yes"), (5, "yes"), (2, "yes"), (1, "yes")]
    assert all(row[1] == row[2] for row in rows)
    assert float(rows[0][4]) < 1e-6
    assert re.search(r"^The features at 5: sex, bmi, ", printed, re.MULTILINE)


def test_a_sparse_autoencoder_has_units_that_are_off(capsys: pytest.CaptureFixture[str]) -> None:
    autoencoder.main(["--epochs", "10", "--strength", "0.1", "--no-compile"])
    printed = capsys.readouterr().out
    assert re.search(r"^sparse +kl_sparsity\(0\.1, .*\) +output of encode\.1 +penalty", printed, re.MULTILINE)
    rows = re.findall(r"^(without rules|kl_sparsity) +(\S+) +(\S+) +(\d+)%$", printed, re.MULTILINE)
    (_, error, active, off), (_, sparse_error, sparse_active, sparse_off) = rows
    assert float(error) < float(sparse_error) < 2.0
    assert float(sparse_active) < 0.5 * float(active)
    assert int(off) < 20
    assert int(sparse_off) > 60


@pytest.mark.slow
def test_fine_tuning_near_the_start_forgets_less(capsys: pytest.CaptureFixture[str]) -> None:
    finetuning.main(["--pretraining", "5"])
    found = re.findall(r"^(.+?)  +([\d.]+)% +([\d.]+)% +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    rows = {name: (float(upright), float(turned), float(moved)) for name, upright, turned, moved in found}
    assert list(rows) == ["before", "no rule", "l2", "l2_sp", "ewc"]
    assert rows["before"][0] > 90
    assert rows["before"][2] == 0
    for name in ("no rule", "l2", "l2_sp", "ewc"):
        assert rows[name][1] > rows["before"][1] + 40
    for near in ("l2_sp", "ewc"):
        assert rows[near][0] > rows["no rule"][0] + 10
        assert rows[near][2] < 0.9 * min(rows["no rule"][2], rows["l2"][2])


def test_the_fisher_diagonal_is_the_mean_squared_gradient() -> None:
    torch.manual_seed(0)
    model, images = finetuning.CNN(), torch.rand(3, 1, 8, 8)
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for image in images:
        chances = model(image[None]).softmax(1)[0]
        for chance in chances:
            gradients = torch.autograd.grad(chance.log(), list(model.parameters()), retain_graph=True)
            for name, gradient in zip(wanted, gradients, strict=True):
                wanted[name] += float(chance.detach()) * gradient.square() / 3
    found = finetuning.fisher(model, finetuning.Digits(images, torch.zeros(3, dtype=torch.int64)))
    for name, one in wanted.items():
        torch.testing.assert_close(found[name], one)


if __name__ == "__main__":
    README.write_text(with_outputs(README.read_text(encoding="utf-8")), encoding="utf-8")
