"""Lints: what a rule does that is seldom meant. Here those that rules and sites alone show."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn

from .effects import Definition
from .groups import group_lasso, sparse_group_lasso
from .matching import Match
from .matrices import nuclear_norm, spectral
from .nonconvex import log_sum, lp, mcp, scad, smooth_l1
from .regularizers import elastic_net, l1, l2, weight_decay
from .rules import On, Rule, is_literal, matcher
from .sites import Owner, Site

LintKind: TypeAlias = Literal["bias-or-norm", "double-decay", "idle-exclude", "scale-invariant", "unreached"]

NORMS: tuple[Definition[...], ...] = (
    l1, l2, elastic_net, lp, smooth_l1, log_sum, scad, mcp, group_lasso, sparse_group_lasso, nuclear_norm, spectral,
)  # fmt: skip
"""Penalties that grow with the weight's scale, be it up to a bound, and pull it to 0."""

_NORMALIZATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # private by name only


@dataclass(frozen=True)
class Lint:
    """Something that is seldom meant. `str()` is one line.

    Attributes:
        kind: `"bias-or-norm"`, `"double-decay"`, `"idle-exclude"`, `"scale-invariant"` or `"unreached"`.
        labels: of the rules it is about.
        sites: the parameters it is about.
        message: what is so, what follows from it, and how to mend it.
    """

    kind: LintKind
    labels: tuple[str, ...]
    sites: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def lint_matches(matches: Iterable[Match]) -> tuple[Lint, ...]:
    """What the rules alone show: norms of biases and normalization scales that nobody named; idle exclusions."""
    return tuple(lint for match in matches for lint in (*_biases_and_norms(match), *_idle_excludes(match)))


def named(sites: Iterable[str], shown: int = 3) -> str:
    """Sites for people."""
    several = [*sites]
    more = f", … ({len(several)} in all)" if len(several) > shown else ""
    return ", ".join(map(repr, several[:shown])) + more


def _biases_and_norms(match: Match) -> Iterator[Lint]:
    if match.rule.effect.definition not in (*NORMS, weight_decay):
        return
    sites = (site for site in match.sites if isinstance(site, Site))
    found = tuple(site.name for site in sites if _is_incidental(match.rule, site))
    if found:
        effect = match.rule.effect.name
        yield Lint(
            "bias-or-norm",
            (match.label,),
            found,
            f"rule {match.label!r} puts {effect} on biases or normalization scales that it does not name: "
            f"{named(found)}. Leave them out with exclude= (or param='weight'); if they are meant, say so with param= "
            "for biases, with layer= for normalizations.",
        )


def _idle_excludes(match: Match) -> Iterator[Lint]:
    """Patterns of `exclude` that name nothing in the model, where they are not made for other models as well."""
    for pattern in match.rule.exclude if not match.rule.optional else ():
        if _names_any(pattern, match.names):
            continue
        meant = next((one for one in _related(pattern, match.rule.on) if _names_any(one, match.names)), None)
        if meant is None and not is_literal(pattern) and pattern.startswith(("*", "re:")):
            continue
        names = "parameter has that full name" if match.rule.on == "param" else "module has that path"
        yield Lint(
            "idle-exclude",
            (match.label,),
            (),
            f"rule {match.label!r}: exclude={pattern!r} leaves out nothing: no {names}. "
            + ("Mend it, or take it away." if meant is None else f"Perhaps {meant!r} is meant."),
        )


def _related(pattern: str, on: On) -> tuple[str, ...]:
    """What may be meant by a pattern that matches nothing: what is in a module, or any name that it is a part of."""
    if pattern.startswith("re:"):
        return (f"{pattern}[.].*",) if on == "param" else ()
    above, _, key = pattern.rpartition(".")
    inside = (f"{pattern}.*",) if on == "param" else (above,) if above else ()
    return (*inside, f"*.{pattern}", f"*{pattern}*") if key else ()


def _names_any(pattern: str, names: Collection[str]) -> bool:
    return pattern in names if is_literal(pattern) else any(map(matcher(pattern), names))


def _is_incidental(rule: Rule, site: Site) -> bool:
    """Whether a site is a bias or a normalization's, and the rule selects it without saying so."""
    if rule.where is not None or len(site.shape) > 1:
        return False
    is_bias = "bias" in site.param.rpartition(".")[2]
    names_biases = not matcher(rule.param)("weight")
    is_norm = any(_is_norm(owner) for owner in site.owners)
    names_layer = (bool(rule.layers) and nn.Module not in rule.layers) or (
        rule.name is not None and is_literal(rule.name)
    )
    if is_norm and names_layer:
        return False
    return is_norm if not is_bias else not names_biases


def _is_norm(owner: Owner) -> bool:
    """Whether a parameter's owner is a normalization: torch's, or anybody's by its name."""
    by_name = (cls.__name__ for cls in owner.kind.classes)
    return any(map(owner.kind.is_a, _NORMALIZATIONS)) or any("Norm" in name for name in by_name)
