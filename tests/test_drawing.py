"""Pictures: every node and every use is in them, names are escaped, and nothing else is written."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxreg
from tests.models import build

RULES = [
    fxreg.Rule(fxreg.l1(0.1), param="*weight", label="a < b & 'c'"),
    fxreg.Rule(fxreg.clip_norm(1.0), param="bias"),
]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def gm() -> torch.fx.GraphModule:
    model, inputs = build("cnn")
    return fxreg.transform(model, RULES, example_inputs=inputs)


def test_svg_has_a_row_for_every_node_and_an_arc_for_every_use(gm: torch.fx.GraphModule, tmp_path: Path) -> None:
    graph = fxreg.to_networkx(gm)
    fxreg.draw(gm, tmp_path / "graph.svg")
    root = ET.parse(tmp_path / "graph.svg").getroot()
    names = ["".join(next(iter(text)).itertext()) for text in root.iter(f"{SVG}text")]
    assert names == list(graph)
    titles = ["".join(title.itertext()) for title in root.iter(f"{SVG}title")]
    assert titles == [f"{one} → {other}: argument {key}" for one, other, key in graph.edges(keys=True)]
    assert {rect.get("fill") for rect in root.iter(f"{SVG}rect")} == {"#ffffff", "#e4e4e4", "#cfe3f5", "#fde0c2"}
    said = "".join(root.itertext())
    assert "features_0_bias_clip_norm" in said
    assert "rule a < b & 'c'" in said
    assert "BatchNorm2d features.1" in said
    height = float(root.get("height", 0))
    tops = [float(rect.get("y", 0)) for rect in root.iter(f"{SVG}rect")]
    assert tops == sorted(set(tops))
    assert tops[-1] + 22 < height
    for path in root.iter(f"{SVG}path"):
        assert min(map(float, re.findall(r"-?[\d.]+", path.get("d", "")))) >= 0  # inside the picture


def test_html_has_the_picture_and_a_legend(gm: torch.fx.GraphModule, tmp_path: Path) -> None:
    fxreg.draw(gm, tmp_path / "graph.svg")
    fxreg.draw(gm, str(tmp_path / "graph.html"))
    page = (tmp_path / "graph.html").read_text(encoding="utf-8")
    assert (tmp_path / "graph.svg").read_text(encoding="utf-8") in page

    class Reader(HTMLParser):
        legend = ""

        def handle_data(self, data: str) -> None:
            if self.get_starttag_text() == '<span style="background:#cfe3f5">':
                self.legend = self.legend or data

    reader = Reader()
    reader.feed(page)
    assert reader.legend == "a < b & 'c'"


def test_dot_has_every_node_and_every_use(gm: torch.fx.GraphModule, tmp_path: Path) -> None:
    graph = fxreg.to_networkx(gm)
    fxreg.draw(gm, tmp_path / "graph.dot")
    first, style, *lines, last, end = (tmp_path / "graph.dot").read_text(encoding="utf-8").split("\n")
    assert (first, last, end) == ("digraph fxreg {", "}", "")
    assert style.startswith("node [")
    assert [re.findall(r'"(\w+)" \[label=', line)[0] for line in lines[: len(graph)]] == list(graph)
    edges = [re.fullmatch(r'"(\w+)" -> "(\w+)" \[label="([\w.]+)"\];', line) for line in lines[len(graph) :]]
    assert [edge and edge.groups() for edge in edges] == list(graph.edges(keys=True))


def test_a_suffix_in_capitals_is_one(gm: torch.fx.GraphModule, tmp_path: Path) -> None:
    for name in ("graph.svg", "GRAPH.SVG"):
        fxreg.draw(gm, tmp_path / name)
    assert (tmp_path / "GRAPH.SVG").read_bytes() == (tmp_path / "graph.svg").read_bytes()


def test_a_graph_without_anything_is_drawn(tmp_path: Path) -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    gm = fxreg.transform(Nothing(), [])
    fxreg.draw(gm, tmp_path / "graph.svg")
    assert len([*ET.parse(tmp_path / "graph.svg").getroot().iter(f"{SVG}rect")]) == len(fxreg.to_networkx(gm))


def test_what_cannot_be_drawn_writes_nothing(gm: torch.fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(fxreg.FxregError, match=r"draw: the file must end in \.dot, \.svg, \.html, got '.*graph\.png'"):
        fxreg.draw(gm, tmp_path / "graph.png")
    with pytest.raises(fxreg.FxregError, match=r"expected a module that fxreg\.transform returned, got Linear"):
        fxreg.draw(nn.Linear(2, 2), tmp_path / "graph.svg")
    assert [*tmp_path.iterdir()] == []
