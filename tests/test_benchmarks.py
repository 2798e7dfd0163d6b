"""The benchmarks run, and all rows of a table train towards the same thing."""

import pytest
import torch

from .benchmarks import rows, step
from .benchmarks.rows import QUICK, Setting

SETTING = Setting(QUICK, torch.device("cpu"))


def test_every_row_without_a_compiler_has_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what the optimizer does by itself."""
    made: list[torch.nn.Module] = []
    make = Setting.model
    monkeypatch.setattr(Setting, "model", lambda setting: made.append(make(setting)) or made[-1])
    monkeypatch.setattr(rows, "STRENGTH", 0.1)
    by_row = {}
    for mode, name, row in rows.rows(SETTING):
        if mode == "eager" and not name.startswith(("plain", "weight_decay", "proximal")):
            row()()
            by_row[name] = [parameter.grad for parameter in made[-1].parameters()]
    expected = by_row["loss term"]
    assert len(by_row) == 7
    for gradients in by_row.values():
        torch.testing.assert_close(gradients, expected)


def test_a_table_has_its_rows_over_the_plain_one() -> None:
    table = step.table("quick", step.sample(SETTING, 2, "eager, fxreg, gradient"))
    assert [line.split("|")[2].strip() for line in table.splitlines() if line.startswith("| eager")] == [
        "plain",
        "fxreg, gradient",
    ]
    assert "1.000–1.000" in table
