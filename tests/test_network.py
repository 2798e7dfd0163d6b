"""The emitted graph as networkx has it: the same nodes and uses as in the code, each with what it is and whose."""

import copy
import io
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, fx, nn

import fxreg
from tests.models import CASES, build

RULES = [fxreg.Rule(fxreg.l1(0.1), param="*weight"), fxreg.Rule(fxreg.clip_norm(1.0), param="*bias", optional=True)]


def emitted(name: str, **kwargs: Any) -> fx.GraphModule:
    model, _ = build(name)
    return fxreg.transform(model, RULES, **kwargs)


@pytest.mark.parametrize("name", CASES)
def test_there_is_a_node_for_every_node_and_an_edge_for_every_use(name: str) -> None:
    gm = emitted(name)
    graph = fxreg.to_networkx(gm)
    assert list(graph) == [node.name for node in gm.graph.nodes]
    assert nx.is_directed_acyclic_graph(graph)
    for node in gm.graph.nodes:
        uses: list[str] = []
        fx.node.map_arg((node.args, node.kwargs), lambda used: uses.append(used.name))  # noqa: B023  called at once
        assert sorted(used for used, _ in graph.in_edges(node.name)) == sorted(uses)
        assert graph.nodes[node.name].keys() == fxreg.network.NodeData.__annotations__.keys()
        assert all(value is None or type(value) is str for value in graph.nodes[node.name].values())


def test_a_node_says_what_it_is_and_whose() -> None:
    graph = fxreg.to_networkx(emitted("cnn"))
    conv, pool, flatten = graph.nodes["features_0_with"], graph.nodes["features_3"], graph.nodes["flatten"]
    assert conv["module"] == "features.0"
    assert conv["layer"] == "torch.nn.modules.conv.Conv2d"
    assert conv["label"] is None
    assert pool == {
        "op": "call_module",
        "target": "features.3",
        "module": "features.3",
        "layer": "torch.nn.modules.pooling.MaxPool2d",
        "label": None,
        "parameter": None,
    }
    assert (flatten["op"], flatten["target"], flatten["module"]) == ("call_method", "flatten", "")
    assert flatten["layer"] == "tests.models.CNN"
    assert graph.nodes["dropout"]["target"] == "torch.nn.functional.dropout"
    assert graph.nodes["head_weight_l1"]["target"].startswith("torch.ops.fxreg.l1.")
    labels = nx.get_node_attributes(graph, "label")
    assert labels["head_weight_l1"] == "l1"
    assert labels["head_bias_clip_norm"] == "clip_norm"
    assert labels["loss_scale"] == labels["attach"] == ""  # they serve several
    assert labels["features_4"] == ""  # what reads a module to call it with another weight
    assert labels["x"] is labels["output"] is None


def test_a_read_of_a_tied_parameter_has_its_first_name() -> None:
    graph = fxreg.to_networkx(emitted("transformer"))
    reads = nx.get_node_attributes(graph, "parameter")
    assert reads["embed_weight"] == "embed.weight"
    assert reads["position"] == "position"
    assert reads["decode"] is None


def test_an_edge_says_at_which_place_a_value_is_used() -> None:
    class Joined(nn.Module):
        def forward(self, x: Tensor, n: Tensor) -> Tensor:
            return torch.cat([x, n], dim=0)[n.size(0) :].addmm(x, x, beta=1).masked_fill(x > 0, value=n.sum())

    graph = fxreg.to_networkx(fxreg.transform(Joined(), []))
    found = {(used, user): sorted(keys) for used, user in graph.edges() if (keys := graph[used][user])}
    assert found["x", "cat"] == ["0.0"]
    assert found["n", "cat"] == ["0.1"]
    assert found["size", "getitem"] == ["1.start"]
    assert found["x", "addmm"] == ["1", "2"]
    assert found["sum_1", "masked_fill"] == ["value"]
    assert found["masked_fill", "output"] == ["0"]
    with_call = fxreg.to_networkx(emitted("mlp"))
    assert [*with_call["fc3_bias_clip_norm"]["fc3_with"]] == ["1.bias"]


def loaded(gm: fx.GraphModule) -> Any:
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, loaded, lambda gm: loaded(copy.deepcopy(gm)), torch.compile])
@pytest.mark.parametrize("name", ["cnn", "transformer", "opaque"])
def test_copied_pickled_and_compiled_modules_give_the_same_graph(name: str, again: Any) -> None:
    gm = emitted(name)
    here, there = fxreg.to_networkx(gm), fxreg.to_networkx(again(gm))
    assert dict(here.nodes(data=True)) == dict(there.nodes(data=True))
    assert list(here.edges(keys=True)) == list(there.edges(keys=True))


def test_of_recordings_it_is_the_one_that_is_tried_first() -> None:
    model, inputs = build("opaque")
    gm = fxreg.transform(model, RULES, example_inputs=inputs)
    graph = fxreg.to_networkx(gm)
    cells = [data for _, data in graph.nodes(data=True) if data["layer"] == "torch.nn.modules.linear.Linear"]
    assert [data["module"] for data in cells] == ["cell"] * 4 + ["head"]


def test_exported_programs_know_their_layers() -> None:
    model, inputs = build("mlp")
    gm = fxreg.transform(torch.export.export(model, inputs), RULES)
    data = fxreg.to_networkx(gm).nodes["linear"]
    assert data["target"] == "torch.ops.aten.linear.default"
    assert (data["module"], data["layer"]) == ("fc1", "torch.nn.modules.linear.Linear")


def test_only_emitted_modules_have_such_a_graph() -> None:
    with pytest.raises(fxreg.FxregError, match="expected a module that fxreg\\.transform returned, got Linear"):
        fxreg.to_networkx(nn.Linear(2, 2))
