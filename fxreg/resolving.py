"""resolve: (matches, captured) → the sites that stand where their rules ask, now that there is a graph."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from .captured import Captured
from .errors import CaptureError
from .matching import Match, decided
from .sites import Site
from .standing import Unseen, View


def resolve(model: nn.Module, matches: tuple[Match, ...], captured: Captured) -> tuple[Match, ...]:
    """Keep of every match the sites that have the position that the rule asks for.

    Raises:
        CaptureError: the graph does not show where a layer stands, or several graphs of the model say different things.
        MatchError: nothing is left, or a conflict on what is.
    """
    if all(match.position is None for match in matches):
        return matches
    return decided(model, narrow(model, matches, captured))


def narrow(model: nn.Module, matches: tuple[Match, ...], captured: Captured) -> tuple[Match, ...]:
    """The same, without asking whether effects can act there."""
    if all(match.position is None for match in matches):
        return matches
    views = [View(model, one.graph) for one in captured.views]
    reasons = {path: reason for one in captured.views for path, reason in one.opaque.items()}
    return tuple(_resolved(match, views, reasons) for match in matches)


def _resolved(match: Match, views: Sequence[View], reasons: Mapping[str, str]) -> Match:
    position, found = match.position, []
    if position is None:
        return match
    for site in match.sites:
        assert isinstance(site, Site)
        answers = {view.stands(site.owners, position) for view in views}
        for answer in answers:
            if isinstance(answer, Unseen):
                where = repr(answer.path) if answer.path else "the model itself"
                why = answer.why or f"it is called as a whole ({reasons.get(answer.path, 'one layer of torch')})"
                raise CaptureError(
                    f"rule {match.label!r} asks for {position!r}, and the graph does not show whether that is so of "
                    f"{site.name!r}, because of {where}: {why}. Leave it out with exclude={site.name!r}, select by "
                    "name= instead, or pass example_inputs= so that more can be seen."
                )
        if len(answers) > 1:
            raise CaptureError(
                f"rule {match.label!r} asks for {position!r}, which is so of {site.name!r} in one of the ways in which "
                "the model was recorded (train mode, evaluation, compiled), and not in another. Select it by name=."
            )
        found += [site] if answers == {True} else []
    return replace(match, sites=tuple(found))
