"""A picture of the emitted graph: a row for each node, in order of execution, and arcs from values to their uses."""

import json
import math
import os
from html import escape
from pathlib import Path
from typing import Any

import networkx as nx
from torch import nn

from .errors import FxregError
from .network import to_networkx

_COLORS = ("#cfe3f5", "#fde0c2", "#d5efd2", "#f5d0dc", "#e2d8f3", "#f6efb4", "#cdeeea", "#ecd9c6")
_SHARED = "#e4e4e4"
_PLAIN = "#ffffff"
_ROW, _CHARACTER, _MARGIN = 22, 7.3, 12
_STYLE = (
    "text{font:12px monospace}.m{fill:#777}rect{stroke:#bbb}path{fill:none;stroke:#999}"
    "path:hover{stroke:#d22;stroke-width:2.5}"
)


def draw(gm: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a picture of the emitted graph. What rules inserted has the color of its rule, what serves several is grey.

    Args:
        gm: what `fxreg.transform` returned.
        path: the file to write: `.svg`, or `.html` with the picture inside: nodes in the order of execution, one a row,
            with arcs from values to their uses; or `.dot`, for Graphviz, which finds a layout of its own.

    Raises:
        FxregError: not a module that `fxreg.transform` returned, or another suffix. Nothing is written.

    >>> import pathlib, tempfile, torch, fxreg
    >>> gm = fxreg.transform(torch.nn.Linear(4, 2), [fxreg.Rule(fxreg.l1(0.1), param="weight")])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fxreg.draw(gm, f"{folder}/graph.dot")
    ...     print(pathlib.Path(folder, "graph.dot").read_text().splitlines()[2])
    "input_1" [label="input_1\\nplaceholder", fillcolor="#ffffff"];
    """
    file = Path(path)
    writers = {".dot": _dot, ".svg": _svg, ".html": _html}
    write = writers.get(file.suffix.lower())
    if write is None:
        raise FxregError(f"draw: the file must end in {', '.join(writers)}, got {str(path)!r}.")
    file.write_text(write(to_networkx(gm)), encoding="utf-8")


def _dot(graph: "nx.MultiDiGraph[str]") -> str:
    colors = _colors(graph)
    lines = ["digraph fxreg {", 'node [shape=box, style=filled, fontname="monospace"];']
    for node, data in graph.nodes(data=True):
        label = f"{node}\n{_what(data)}" + (f"\nrule {data['label']}" if data["label"] else "")
        lines.append(f"{_quoted(node)} [label={_quoted(label)}, fillcolor={_quoted(colors[data['label']])}];")
    lines += [f"{_quoted(a)} -> {_quoted(b)} [label={_quoted(key)}];" for a, b, key in graph.edges(keys=True)]
    return "\n".join([*lines, "}", ""])


def _svg(graph: "nx.MultiDiGraph[str]") -> str:
    colors, row = _colors(graph), {node: number for number, node in enumerate(graph)}
    longest = max((row[b] - row[a] for a, b in graph.edges()), default=1)
    left = _MARGIN + _bulge(longest)
    texts = {node: _text(node, data) for node, data in graph.nodes(data=True)}
    width = 2 * _MARGIN + _CHARACTER * max(len(node) + sum(map(len, text)) for node, text in texts.items())
    box, parts = f'width="{width:.0f}" height="{_ROW - 3}" rx="3"', []
    for node, data in graph.nodes(data=True):
        top = _MARGIN + _ROW * row[node]
        what, where, rule = map(escape, texts[node])
        parts += [
            f'<rect x="{left}" y="{top}" {box} fill="{colors[data["label"]]}"/>',
            f'<text x="{left + 6}" y="{top + 14}"><tspan font-weight="bold">{escape(node)}</tspan>{what}'
            f'<tspan class="m">{where}</tspan>{rule}</text>',
        ]
    for one, other, key in graph.edges(keys=True):
        start, end = (_MARGIN + _ROW * (row[node] + 0.5) - 1 for node in (one, other))
        x = left - _bulge(row[other] - row[one])
        title = escape(f"{one} → {other}: argument {key}")
        parts.append(f'<path d="M{left} {start}C{x} {start} {x} {end} {left} {end}"><title>{title}</title></path>')
    size = f'width="{left + width + _MARGIN:.0f}" height="{2 * _MARGIN + _ROW * len(row)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{_STYLE}</style>\n' + "\n".join(parts) + "\n</svg>\n"


def _html(graph: "nx.MultiDiGraph[str]") -> str:
    legend = "".join(
        f'<span style="background:{color}">{escape(label)}</span> ' for label, color in _colors(graph).items() if label
    )
    style = "<style>body{font:14px monospace}span{padding:2px 6px}</style>"
    head = f'<!doctype html>\n<html><head><meta charset="utf-8"><title>fxreg</title>{style}</head>'
    return f"{head}\n<body><p>{legend}</p>\n{_svg(graph)}</body></html>\n"


def _colors(graph: "nx.MultiDiGraph[str]") -> dict[str | None, str]:
    """A color for the label of every rule, in order."""
    labels = dict.fromkeys(label for _, label in graph.nodes(data="label") if label)
    return {None: _PLAIN, "": _SHARED} | {one: _COLORS[i % len(_COLORS)] for i, one in enumerate(labels)}


def _what(data: dict[str, Any]) -> str:
    return str(data["op"] if data["op"] in ("placeholder", "output") else data["target"])


def _text(node: str, data: dict[str, Any]) -> tuple[str, str, str]:
    """What a row says behind the node's name: what it is, where it stands, and whose it is."""
    layer = f"  {data['layer'].rpartition('.')[2]} {data['module']}".rstrip() if data["layer"] else ""
    return f"  {_what(data)}", layer, f"  rule {data['label']}" if data["label"] else ""


def _bulge(rows: int) -> int:
    """How far an arc over so many rows reaches to the left."""
    return 10 + 14 * math.isqrt(rows)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
