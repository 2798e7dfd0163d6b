"""The code of a graph that assumes something: a question before it."""

from typing import Any

from torch import fx

from . import calls


class Asking(fx.graph.CodeGen):
    """Code that asks before anything else whether what the graph assumes holds, and runs the next graph if not.

    Args:
        child: the name of the child that knows.
    """

    def __init__(self, graph: fx.Graph, child: str) -> None:
        super().__init__()
        places: list[str] = []
        for node in graph.nodes:
            if node.op == "placeholder":
                by_name = any(place.startswith("*") for place in places) and not node.target.startswith("*")
                places.append(f"{node.target}={node.target}" if by_name else str(node.target))
        (check,) = (node for node in graph.nodes if node.target is calls.expect_assumed)
        asked = [str(node.target).lstrip("*") for node in check.args[1]]  # its name may be other, and not yet bound
        which = check.args[2] if len(check.args) > 2 else 0
        if which:
            asked.append(f"which={which}")
        self._lines = (
            f"    if not self.{child}.assumes({', '.join(asked)}):\n"
            f"        return self.{child}.others[{which}].forward({', '.join(places)})\n"
        )
        unused = (check, check.args[0]) if len(check.args[0].users) == 1 else (check,)
        self._dropped = tuple(f"{node.name} = " for node in unused)
        self._body_transformer = self._without_check

    def _without_check(self, body: list[str]) -> list[str]:
        """The node asks whoever runs the graph by other means than this code."""
        kept = [*body]
        for number, text in enumerate(body):
            if text.startswith(self._dropped):  # what follows ends its line
                kept[number : number + 2] = "", ""
        return kept

    def gen_fn_def(self, *args: Any, **kwargs: Any) -> str:
        return f"{super().gen_fn_def(*args, **kwargs)}\n{self._lines}"
