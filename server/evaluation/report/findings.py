"""State in sentences what the numbers show and what they do not. No number is computed here."""

from __future__ import annotations

from dataclasses import dataclass

from common.arms import FEDERATED, FEDERATED_DP, LOCAL, POOLED, PUBLIC, is_control
from server.evaluation.estimates import COMPARISONS
from server.evaluation.report.numerals import cut, score, signed
from server.evaluation.report.reading import TRAINED, Estimate, Reading, title
from server.evaluation.report.words import listing

LEADS = (FEDERATED, FEDERATED_DP, POOLED, LOCAL, PUBLIC)
"""Whose score at an unseen site the headline gives: the first that has one."""


@dataclass(frozen=True, kw_only=True)
class Banner:
    """`level` is `alarm`, `caution` or `calm`."""

    level: str
    title: str
    lines: list[str]


def verdict(difference: Estimate) -> str:
    """The key of `contrasts.*` that says what an interval allows to say."""
    value, low, high = difference["value"], difference["low"], difference["high"]
    if value is None:
        return "not_estimable"
    if low is None or high is None:
        return "no_interval"
    if low == high == 0:
        return "same"
    return "higher" if low > 0 else "lower" if high < 0 else "unclear"


def interval(reading: Reading, found: Estimate) -> str:
    if found["low"] is None or found["high"] is None:
        return reading.say("headline.no_interval")
    return reading.say("headline.interval", low=cut(found["low"]), high=cut(found["high"]))


def headline(reading: Reading) -> list[str]:
    """The answer to "does it generalize to a hospital never seen?": first sentence, then the private arm's
    where both exist.
    """
    say = reading.say
    if not reading.held_out:
        return [say("headline.nothing", reason=say("headline.nothing.none"))]
    sites = listing(
        [say("headline.site", site=reading.name(site), kind=reading.kind(site)) for site in reading.held_out]
    )
    if not any(reading.is_scored(site) for site in reading.held_out):
        return [say("headline.nothing", reason=say("headline.nothing.unscored", sites=sites))]
    arms = [arm for arm in LEADS if reading.score(arm, "unseen")]
    if not arms:
        return [say("headline.nothing", reason=say("headline.nothing.no_score", sites=sites))]
    lead = arms[0]
    return [
        _at_unseen(reading, arm, sites)
        for arm in [lead, *(arm for arm in arms[1:] if reading.is_private(arm))]
    ]


def _at_unseen(reading: Reading, arm: str, sites: str) -> str:
    say = reading.say
    found = reading.score(arm, "unseen")
    assert found is not None
    assert found["value"] is not None
    groups: dict[str, list[str]] = {"higher": [], "lower": [], "unclear": []}
    for first, second in COMPARISONS:
        if arm not in (first, second) or (difference := reading.contrast(first, second, "unseen")) is None:
            continue
        other, way = (second, verdict(difference)) if arm == first else (first, _turned(verdict(difference)))
        groups.get(way, groups["unclear"]).append(reading.describe("who", other))
    verdicts = [
        say(f"headline.{word}", others=listing(groups[way]))
        for way, word in (("higher", "better"), ("lower", "worse"), ("unclear", "unclear"))
        if groups[way]
    ]
    if found["low"] is not None and found["high"] is not None and found["low"] <= 0.5 <= found["high"]:
        verdicts.append(say("headline.chance"))
    who = reading.describe("who", arm)
    tag = reading.privacy_tag(arm) if reading.is_private(arm) else ""
    return say(
        "headline.sentence",
        sites=sites,
        who=f"{who} ({tag})" if tag else who,
        value=score(found["value"]),
        interval=interval(reading, found),
        verdicts=": " + "; ".join(verdicts) if verdicts else "",
    )


def controls(reading: Reading) -> list[str]:
    """What the difference between a private arm and its control says, where both have a model."""
    return [
        reading.say("contrasts.control", arm=arm, control=other)
        for arm, other in COMPARISONS
        if is_control(other) and reading.models_of(arm) and reading.models_of(other)
    ]


def _turned(way: str) -> str:
    return {"higher": "lower", "lower": "higher"}.get(way, way)


def remarks(reading: Reading) -> list[str]:
    """What belongs under the headline: how far one held-out site reaches, and whether any hospital is worse
    off.
    """
    say, lines = reading.say, []
    if reading.held_out:
        count = len(reading.held_out)
        lines.append(say("headline.one_site") if count == 1 else say("headline.few_sites", count=count))
        lines += _at_chance(reading)
    for arm, other in ((FEDERATED, LOCAL), (FEDERATED_DP, PUBLIC)):
        found = {site: reading.contrast(arm, other, site) for site in reading.training}
        known = {site: difference for site, difference in found.items() if difference is not None}
        if not known:
            continue
        labels = {"arm": reading.label(arm), "other": other, "total": len(known)}
        below = [
            site
            for site, difference in known.items()
            if difference["value"] is not None and difference["value"] < 0
        ]
        certain = [site for site in below if verdict(known[site]) == "lower"]
        if not below:
            lines.append(say("headline.below.nowhere", **labels))
            continue
        named = listing([f"{site} {signed(known[site]['value'] or 0.0)}" for site in below])
        lines.append(
            say(
                "headline.below",
                below=len(below),
                sites=named,
                certain=listing(certain) or say("headline.none_of_them"),
                **labels,
            )
        )
    return lines


def _at_chance(reading: Reading) -> list[str]:
    """For the shared models, the artifacts on which a held-out site's interval includes 0.5: a macro score
    can hide them.
    """
    lines = []
    for arm in (FEDERATED, FEDERATED_DP):
        for site in reading.held_out:
            rows = reading.evaluation["metrics"].get(arm, {}).get(site, {})
            known = {
                name: row for name, row in rows.items() if row["low"] is not None and row["high"] is not None
            }
            names = [
                f"{title(name)} ({score(row['auroc'])})"
                for name, row in known.items()
                if row["low"] <= 0.5 <= row["high"]
            ]
            if names:
                values = {"site": reading.name(site), "arm": reading.label(arm), "artifacts": listing(names)}
                lines.append(reading.say("headline.at_chance", **values))
    return lines


def privacy_banner(reading: Reading) -> Banner:
    """Loud where no private arm ran, or where the private arm has a hole; never silent about the other
    arms.
    """
    say = reading.say
    private = [arm for arm in reading.arms if reading.is_private(arm)]
    trained = [arm for arm in reading.arms if arm in TRAINED and reading.models_of(arm)]
    others = [arm for arm in trained if arm not in private]
    refusals = _refusals(reading)
    tags = [*(f"{arm}: {reading.privacy_tag(arm)}." for arm in private), *refusals]
    if not private:
        lines = [say("privacy.none")]
        if FEDERATED_DP in reading.arms:
            lines += [say("privacy.none.planned"), *refusals]
        kinds = sorted({site["kind"] for site in reading.sites if site["role"] == "training"})
        if "hospital" not in kinds:
            lines.append(say("privacy.none.no_patients", kinds=listing(kinds, "or")))
        if reading.noised:
            lines += _scores(reading)
        return Banner(level="alarm", title=say("privacy.none.title"), lines=lines)
    given = [site for site, claim in reading.claims.items() if not claim["refused"]]
    if reading.unprotected or not given:
        sites = listing(reading.unprotected or reading.training)
        void = [site for site in reading.unprotected if reading.claims[site].get("void")]
        why = [say("privacy.void", sites=listing(void))] if void else []
        return Banner(
            level="alarm",
            title=say("privacy.hole.title", sites=sites),
            lines=[say("privacy.hole"), *why, *tags],
        )
    if others:
        mixed = say("privacy.mixed", others=listing(others))
        return Banner(
            level="caution",
            title=say("privacy.mixed.title", private=listing(private)),
            lines=[*tags, mixed, *_scores(reading)],
        )
    return Banner(
        level="calm",
        title=say("privacy.all.title"),
        lines=[*tags, say("privacy.all"), *_scores(reading)],
    )


def _scores(reading: Reading) -> list[str]:
    """How the numbers of the page were obtained: with noise, or as exact counts."""
    noised = [f"{site} ({reading.noise_tag(site)})" for site in reading.noised]
    exact = [site["site"] for site in reading.sites if site["site"] not in reading.noised]
    lines = [reading.say("privacy.scores_noised", sites=listing(noised))] if noised else []
    if noised and exact:
        lines.append(reading.say("privacy.scores_exact_at", sites=listing(exact)))
    return lines if noised else [reading.say("privacy.scores_exact")]


def _refusals(reading: Reading) -> list[str]:
    """Who refused the private arm, once a code and reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for site, claim in reading.claims.items():
        if claim["refused"]:
            groups.setdefault((claim["refused"]["code"], claim["refused"]["reason"].rstrip(".")), []).append(
                site
            )
    return [
        reading.say("privacy.refused", sites=listing(sites), code=code, reason=reason)
        for (code, reason), sites in groups.items()
    ]


def not_measured(reading: Reading) -> list[str]:
    """Everything a reader might think was measured and was not, from this evaluation alone."""
    say, evaluation = reading.say, reading.evaluation
    lines = []
    kinds = sorted({site["kind"] for site in reading.sites})
    others = [site for site in reading.sites if site["kind"] != "hospital"]
    if "hospital" not in kinds:
        lines.append(say("not.no_hospital", kinds=listing(kinds, "or")))
    elif others:
        lines.append(
            say("not.some_hospital", sites=listing([f"{site['site']} ({site['kind']})" for site in others]))
        )
    lines += [say("not.stand_in", sites=sites, text=text) for sites, text in reading.daggers]
    if len(reading.held_out) < 2:
        lines.append(say("not.one_unseen" if reading.held_out else "not.no_unseen"))
    lines.append(say("not.one_seed", seed=evaluation["seed"]))
    lines += _gaps(reading)
    lines += [
        say("not.arm", arm=arm)
        if arm in reading.arms
        else say("not.arm_absent", arm=arm, what=reading.describe("arm", arm))
        for arm in LEADS
        if not reading.models_of(arm)
    ]
    lines += [
        say("not.incomplete", line=line.rstrip("."))
        for line in [*evaluation["refusals"], *evaluation["incomplete"]]
    ]
    if changed := evaluation.get("data_changed"):
        lines.append(say("not.data_changed", sites=listing(changed)))
    lines += [say("not.calibration"), say("not.readers"), say("not.severity")]
    if evaluation["private_arms"]:
        lines.append(say("not.audit"))
    return lines


def _gaps(reading: Reading) -> list[str]:
    """Sites and artifacts without patients, or with too few."""
    say, lines = reading.say, []
    averaged: set[frozenset[str]] = set()
    for site in [*reading.training, *reading.held_out]:
        if not reading.is_scored(site):
            lines.append(say("not.unscored", site=site))
            continue
        if site in reading.noised:
            lines.append(say("not.noised", site=site, tag=reading.noise_tag(site)))
            continue
        sizes = reading.sizes[site]
        empty = [title(name) for name, (pos, neg) in sizes.items() if pos + neg == 0]
        one_class = [
            title(name) for name, (pos, neg) in sizes.items() if pos + neg > 0 and min(pos, neg) == 0
        ]
        thin = [title(name) for name, (pos, neg) in sizes.items() if min(pos, neg) == 1]
        averaged.add(frozenset(reading.averaged(site)))
        for key, names in (("n0", empty), ("one_class", one_class), ("thin", thin)):
            if names:
                lines.append(
                    say(f"not.{key}", site=site, artifacts=listing(names, "or" if key != "n0" else "and"))
                )
    if len(averaged) > 1:
        lines.append(say("not.macro_differs"))
    return lines
