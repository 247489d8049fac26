"""The officer's report as a page: what people read of it, sites that are alike taken together."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from server import officer_words as words
from server.documents import render
from server.spent_plot import Point, drawing

TEMPLATE = "officer.html.jinja"
MOST_CURVES, MOST_ROWS, FEW_NAMES = 6, 24, 3
"""Drawings and rows of a page, worst first; more stand in the JSON. Names that are spelled out."""
PAIR, FINGERPRINT = 2, 16
ODDS_DIGITS = 3

Site = Mapping[str, Any]


def page(report: Mapping[str, Any]) -> str:
    """One self-contained page: no script, no address outside the file."""
    sites = sorted(report["sites"], key=_share, reverse=True)
    return render(
        TEMPLATE,
        report=report,
        worst=sites[0],
        odds=odds(sites[0]["epsilon"]["proved"]),
        curves=_curves(sites),
        rows=_merged(sites, _spending),
        checks=_checks(sites),
        audits=_audits(sites),
        keys=_merged(sites, _keys),
        ordered=_ordered(sites)[:MOST_ROWS],
        more=max(0, len(sites) - MOST_ROWS),
        chance=chance(sites[0]["delta"]),
        open_points=_open_points(sites),
    )


def odds(epsilon: float | str) -> str:
    """The factor of a guess's odds, rounded up.

    >>> odds(3.0), odds(0.5), odds("inf")
    ('20.1', '1.65', 'without limit')
    """
    if isinstance(epsilon, str) or epsilon > math.log(1e9):
        return "without limit"
    factor = math.exp(epsilon)
    digits = max(0, ODDS_DIGITS - 1 - int(math.log10(factor)))
    scale = 10**digits
    return f"{math.ceil(factor * scale) / scale:,.{digits}f}"


def chance(delta: float) -> str:
    """A delta as a chance.

    >>> chance(1e-4), chance(3e-5)
    ('1 in 10,000', '1 in 33,333')
    """
    return f"1 in {math.floor(1 / delta + 1e-6):,}"


def names(sites: Sequence[Site], everybody: int = 0) -> str:
    """Sites as a page names them; `everybody`: how many there are in all.

    >>> names([{"site": "a"}, {"site": "b"}]), names([{"site": f"s-{n}"} for n in range(9)])
    ('a, b', 's-0, s-1, s-2 and 6 more')
    >>> names([{"site": "a"}, {"site": "b"}], 2)
    'both sites'
    """
    known = [str(site["site"]) for site in sites]
    if len(known) == everybody > 1:
        return "both sites" if everybody == PAIR else f"all {everybody} sites"
    if len(known) <= FEW_NAMES + 2:
        return ", ".join(known)
    return f"{', '.join(known[:FEW_NAMES])} and {len(known) - FEW_NAMES} more"


def _share(site: Site) -> float:
    spent = site["epsilon"]["proved"]
    return math.inf if isinstance(spent, str) else float(spent) / float(site["cap"])


def _merged(sites: Sequence[Site], facts: Callable[[Site], dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for all sites of which the same is said."""
    groups: dict[str, tuple[dict[str, Any], list[Site]]] = {}
    for site in sites:
        said = facts(site)
        groups.setdefault(repr(said), (said, []))[1].append(site)
    rows = [
        {"sites": names(_ordered(alike), len(sites)), **said} for said, alike in groups.values()
    ]
    return rows[:MOST_ROWS]


def _ordered(sites: Sequence[Site]) -> list[Site]:
    return sorted(sites, key=lambda site: (len(site["site"]), site["site"]))


def _spending(site: Site) -> dict[str, Any]:
    return {
        "dataset": site["dataset"],
        "unit": site["unit"],
        "epsilon": site["epsilon"]["proved"],
        "two": site["epsilon_two_records"],
        "committed": site["committed"],
        "cap": site["cap"],
        "delta": site["delta"],
        "share": min(100, math.ceil(100 * min(1.0, _share(site)))),
        "rounds": site["rounds"],
        "filtered": any(plan["admission"] == "filter" for plan in site["plans"]),
    }


def _curves(sites: Sequence[Site]) -> list[dict[str, Any]]:
    def curve(site: Site) -> dict[str, Any]:
        same = ("epsilon", "cap", "run")
        return {"points": [tuple(point[name] for name in same) for point in site["history"]]}

    drawn = []
    for row in _merged(sites, curve)[:MOST_CURVES]:
        first = next(site for site in sites if curve(site)["points"] == row["points"])
        title = (
            f"{row['sites']}: epsilon {first['epsilon']['proved']:.3f} of cap {first['cap']:g} "
            f"after {first['rounds']['charged']} rounds"
        )
        drawn.append({"sites": row["sites"], "svg": _drawn(first, title)})
    return drawn


def _drawn(site: Site, title: str) -> Markup:
    return drawing([Point(**point) for point in site["history"]], title)


def _checks(sites: Sequence[Site]) -> list[dict[str, Any]]:
    """Rows of all sites, the same ones once; what does not agree comes first."""
    rows: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        for check in site["checks"]:
            rows.setdefault(tuple(check.items()), []).append(site)
    merged = [
        {
            "sites": names(_ordered(alike), len(sites)),
            "everybody": len(alike) == len(sites),
            **dict(said),
        }
        for said, alike in rows.items()
    ]
    return sorted(merged, key=lambda row: bool(row["agrees"]))[: 2 * MOST_ROWS]


def _audits(sites: Sequence[Site]) -> list[dict[str, Any]]:
    return [
        {"site": site["site"], "attacked": _attacked(audit), **audit}
        for site in sites
        for audit in site["audits"]
    ]


def _attacked(audit: Mapping[str, Any]) -> str:
    kind = audit.get("kind", str(audit["design"]).partition(":")[0])
    return words.AUDITS.get(kind, words.OTHER_AUDIT)


def _keys(site: Site) -> dict[str, Any]:
    found = site["verification"]
    return {
        "site_key": found["site_key"][:FINGERPRINT],
        "officer_key": found["officer_key"][:FINGERPRINT],
        "signed_end": found["signed_end"],
        "key_pinned": found["key_pinned"],
        "officer_pinned": found["officer_pinned"],
    }


def _open_points(sites: Sequence[Site]) -> list[str]:
    """What the reader can still do to know more."""
    found = [site["verification"] for site in sites]
    points = []
    if not all(each["key_pinned"] for each in found):
        points.append(
            "Whose books these are, they say themselves: compare the site's key with the one you "
            "wrote down at enrolment, or give it (--key)."
        )
    if not all(each["officer_pinned"] for each in found):
        points.append(
            "Whose cap it is, the books say themselves: compare the officer's key with your own, "
            "or give it (--officer)."
        )
    if not all(each["head_pinned"] for each in found):
        points.append(
            "That no later entries were cut off, nobody outside confirmed: ask a witness "
            "(--witness), or give an earlier head (--head)."
        )
    return points
