"""State in sentences what the numbers show and what they do not. No number is computed here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.any_artifact import ANY
from common.arms import (
    BASELINES,
    FEDERATED,
    FEDERATED_CLIPPED,
    FEDERATED_DP,
    FEDERATED_FROZEN,
    LOCAL,
    LOCAL_CLIPPED,
    LOCAL_DP,
    LOCAL_FROZEN,
    POOLED,
    PUBLIC,
)
from server.evaluation.estimates import COMPARISONS
from server.evaluation.inference import LEVEL
from server.evaluation.next_hospital import FEW_HOSPITALS, MIN_HOSPITALS
from server.evaluation.participation import Participation
from server.evaluation.report.numerals import score, signed
from server.evaluation.report.reading import TRAINED, Reading
from server.evaluation_file import Contrast, Gap, Interval

LEADS = (FEDERATED, FEDERATED_DP, POOLED, LOCAL, PUBLIC)
"""Whose score at an unseen site the headline gives: the first that has one."""


PRICES = (
    (FEDERATED_DP, FEDERATED_CLIPPED, FEDERATED_FROZEN, FEDERATED),
    (LOCAL_DP, LOCAL_CLIPPED, LOCAL_FROZEN, LOCAL),
)
"""A private arm, its control with noise 0, the frozen arm, and the arm without privacy, of one trainer."""
MAX_NAMED = 8
"""How many cells a sentence names."""


@dataclass(frozen=True, kw_only=True)
class Banner:
    """`level` is `alarm`, `caution` or `calm`."""

    level: str
    title: str
    lines: list[str]


def verdict(difference: Contrast) -> str:
    """The key of `contrasts.*` that says what a difference allows to say after Holm's correction; `alone`:
    its own interval excludes zero, and the correction does not let it.
    """
    value, low, high, p = (difference[key] for key in ("value", "low", "high", "p_holm"))
    if value is None:
        return "not_estimable"
    if low is None or high is None:
        return "no_interval"
    if low == high == 0:
        return "same"
    if p is not None and p < 1 - LEVEL:
        return "higher" if value > 0 else "lower"
    return "alone" if low > 0 or high < 0 else "unclear"


def interval(reading: Reading, found: Interval) -> str:
    if found["low"] is None or found["high"] is None:
        return reading.say("headline.no_interval")
    return reading.say("headline.interval", low=score(found["low"]), high=score(found["high"]))


def headline(reading: Reading) -> list[str]:
    """The answer to "does it generalize to a hospital never seen?": first sentence, then the private arm's
    where both exist.
    """
    say = reading.say
    if not reading.held_out:
        return [say("headline.nothing", reason=say("headline.nothing.none"))]
    sites = reading.listing(
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


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A question of the first screen and its answer, in sentences made from the numbers."""

    question: str
    lines: list[str]
    faint: frozenset[str] = frozenset()  # of the lines, those that say little: shown grey


def answers(reading: Reading, participation: Participation, *, trainable: str) -> list[Answer]:
    """How good at the hospitals that trained and at one that did not, what privacy cost, who was missing."""
    say = reading.say
    gap, few = _gap(reading)
    return [
        Answer(question=say("ask.home"), lines=_at_home(reading)),
        Answer(question=say("ask.unseen"), lines=[*headline(reading), *gap], faint=few),
        Answer(question=say("ask.privacy"), lines=_cost(reading, trainable)),
        Answer(question=say("ask.missing"), lines=_missing(reading, participation)),
    ]


def _at_home(reading: Reading) -> list[str]:
    say, lines = reading.say, []
    arms = [arm for arm in LEADS if reading.score(arm, "home")]
    for arm in arms[:1] + [arm for arm in arms[1:] if reading.is_private(arm)]:
        found = reading.score(arm, "home")
        assert found is not None
        at = {site: one["value"] for site in reading.training if (one := reading.score(arm, site))}
        known = sorted((value, site) for site, value in at.items() if value is not None)
        (low, worst), (high, best) = known[0], known[-1]
        lines.append(
            say(
                "answer.home" if len(known) > 1 else "answer.home.one",
                count=len(known),
                who=_who(reading, arm),
                value=score(found["value"] or 0.0),
                interval=interval(reading, found),
                worst=reading.name(worst),
                low=score(low),
                best=reading.name(best),
                high=score(high),
            )
        )
    if not lines:
        return [say("answer.home.none")]
    return [*lines, *_at_point(reading, arms[0])]


def _at_point(reading: Reading, arm: str) -> list[str]:
    """The range of sensitivity and specificity over training sites and artifacts, at the operating point."""
    found = [
        (reading.performance(model, site, artifact), f"{reading.title(artifact)} / {reading.name(site)}")
        for site in reading.training
        if reading.is_scored(site) and (model := reading.model_at(arm, site))
        for artifact in reading.artifacts
    ]
    known = [
        (one.sensitivity.value, one.specificity.value, cell)
        for one, cell in found
        if one.sensitivity and one.specificity
    ]
    if not known:
        return []
    least, worst = min((sensitivity, cell) for sensitivity, _, cell in known)
    least_specificity, worst_specificity = min((specificity, cell) for _, specificity, cell in known)
    return [
        reading.say(
            "answer.point",
            arm=reading.label(arm),
            cells=len(known),
            sensitivity=score(float(np.median([sensitivity for sensitivity, *_ in known]))),
            least_sensitivity=score(least),
            worst_sensitivity=worst,
            specificity=score(float(np.median([specificity for _, specificity, _ in known]))),
            least_specificity=score(least_specificity),
            worst_specificity=worst_specificity,
        )
    ]


def _gap(reading: Reading) -> tuple[list[str], frozenset[str]]:
    """Unseen less home of the arms that the headline speaks of, and what to expect at the next hospital; and
    the lines of so few hospitals that they say little.
    """
    say, few = reading.say, set()
    lines: list[str] = []
    gaps = reading.evaluation.get("generalization_gap", {})
    arms = [arm for arm in LEADS if arm in gaps and reading.score(arm, "unseen")]
    for arm in arms[:1] + [arm for arm in arms[1:] if reading.is_private(arm)]:
        gap = gaps[arm]
        line = say(
            "answer.gap",
            arm=reading.label(arm),
            difference=difference_text(reading, gap),
            artifacts=reading.listing([reading.title(name) for name in gap["artifacts"]]),
            count=gap["held_out"],
        )
        if gap["next_low"] is None or gap["next_high"] is None:
            lines.append(f"{line} {say('answer.next.none', least=MIN_HOSPITALS)}")
            continue
        is_few = gap["held_out"] <= FEW_HOSPITALS
        word = "answer.next.few" if is_few else "answer.next"
        next_one = say(word, arm=reading.label(arm), low=score(gap["next_low"]), high=score(gap["next_high"]))
        lines += [line, next_one]
        few |= {next_one} if is_few else set()
    if not lines and reading.held_out and "generalization_gap" in reading.evaluation:
        lines.append(say("answer.gap.none"))
    return lines, frozenset(few)


def _cost(reading: Reading, trainable: str) -> list[str]:
    """What privacy cost in all, and its parts where the controls ran."""
    say, lines = reading.say, []
    for private, control, frozen, other in PRICES:
        if not reading.models_of(private):
            continue
        where = "unseen" if reading.contrast(private, other, "unseen") else "home"
        place = _place(reading, where)
        total = reading.contrast(private, other, where)
        tag = {"arm": private, "tag": reading.privacy_tag(private)}
        if total is None:
            lines.append(say("answer.cost.none", needed=other, **tag))
            continue
        line = say("answer.cost", where=place, difference=difference_text(reading, total), other=other, **tag)
        parts = [reading.contrast(control, other, where), reading.contrast(private, control, where)]
        if parts[0] is None or parts[1] is None:
            line = f"{line} {say('answer.cost.whole', needed=control)}"
        else:
            rest, noise = (difference_text(reading, part) for part in parts if part)
            split = [reading.contrast(frozen, other, where), reading.contrast(control, frozen, where)]
            if all(split):
                layers, clip = (difference_text(reading, part) for part in split if part)
                line = f"{line} {say('answer.cost.all_parts', layers=layers, clip=clip, noise=noise)}"
            else:
                word = "answer.cost.parts" if trainable != "all" else "answer.cost.parts_all"
                line = f"{line} {say(word, rest=rest, noise=noise)}"
        lines.append(line)
    if not lines:
        planned = [arm for arm, *_ in PRICES if arm in reading.arms]
        lines.append(say("answer.cost.refused" if planned else "answer.cost.no_arm"))
    return lines


def _missing(reading: Reading, participation: Participation) -> list[str]:
    """Sites that did not train in every round or sent no score; or that none was missing."""
    say, lines = reading.say, [_refusal_line(reading, *row) for row in _refusal_groups(reading)]
    absences: dict[tuple[str, int, int, str], list[str]] = {}
    for arm, rows in participation.items():
        for site, presence in rows.items():
            claim = reading.claims.get(site) if reading.is_private(arm) else None
            said = claim is not None and claim["refused"] is not None
            if presence.counted < presence.rounds and not said:
                why = reading.listing(sorted(presence.codes)) or say("answer.missing.no_code")
                key = reading.name(site), presence.counted, presence.rounds, why
                absences.setdefault(key, []).append(arm)
    for (name, counted, rounds, why), arms in absences.items():
        numbers = {"counted": counted, "rounds": rounds}
        lines.append(say("answer.missing.rounds", site=name, arms=reading.listing(arms), why=why, **numbers))
    unscored = [reading.name(site["site"]) for site in reading.sites if not reading.is_scored(site["site"])]
    if unscored:
        lines.append(say("answer.missing.score", sites=reading.listing(unscored)))
    if not lines:
        word = "answer.missing.none" if participation else "answer.missing.no_score"
        lines.append(say(word, count=len(reading.sites), training=len(reading.training)))
    return [*lines, *_estimable(reading)]


def _who(reading: Reading, arm: str) -> str:
    who = reading.describe("who", arm)
    return f"{who} ({reading.privacy_tag(arm)})" if reading.is_private(arm) else who


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
        say(f"headline.{word}", others=reading.listing(groups[way]))
        for way, word in (("higher", "better"), ("lower", "worse"), ("unclear", "unclear"))
        if groups[way]
    ]
    if found["low"] is not None and found["high"] is not None and found["low"] <= 0.5 <= found["high"]:
        verdicts.append(say("headline.chance"))
    return say(
        "headline.sentence",
        sites=sites,
        who=_who(reading, arm),
        value=score(found["value"]),
        interval=interval(reading, found),
        verdicts=": " + "; ".join(verdicts) if verdicts else "",
    )


def private_gain(reading: Reading) -> list[str]:
    """What the private federated model gains over its start, and whether federation is the cause: without the
    control, each hospital alone in private, that is not said.
    """
    if not reading.models_of(FEDERATED_DP) or not reading.models_of(PUBLIC):
        return []
    where = "unseen" if reading.contrast(FEDERATED_DP, PUBLIC, "unseen") else "home"
    gain = reading.contrast(FEDERATED_DP, PUBLIC, where)
    if gain is None:
        return []
    said = {"where": _place(reading, where), "difference": difference_text(reading, gain)}
    if verdict(gain) != "higher":
        return [reading.say("gain.none", **said)]
    control = reading.contrast(FEDERATED_DP, LOCAL_DP, where)
    if control is None:
        return [reading.say("gain.no_control", control=LOCAL_DP, **said)]
    word = {"higher": "gain.federation", "lower": "gain.alone_better"}.get(verdict(control), "gain.either")
    return [reading.say(word, control=LOCAL_DP, other=difference_text(reading, control), **said)]


def against_baseline(reading: Reading) -> list[str]:
    """Whether each network beats every baseline of the run, a sentence a network: at the unseen sites where
    some were held out, else at home.
    """
    lines = []
    for arm in (FEDERATED, FEDERATED_DP, LOCAL):
        where = next(
            (at for at in ("unseen", "home") for one in BASELINES if reading.contrast(arm, one, at)), "home"
        )
        found = {one: row for one in BASELINES if (row := reading.contrast(arm, one, where)) is not None}
        if not found:
            continue
        ways = [verdict(row) for row in found.values()]
        way = "worse" if "lower" in ways else "better" if set(ways) == {"higher"} else "not_shown"
        differences = [
            reading.say("baseline.difference", baseline=one, difference=difference_text(reading, row))
            for one, row in found.items()
        ]
        place = _place(reading, where) if where == "unseen" else reading.say("baseline.home")
        said = {"where": place, "differences": reading.listing(differences)}
        lines.append(reading.say(f"baseline.{way}", arm=arm, **said))
    return lines


def _place(reading: Reading, where: str) -> str:
    return (
        reading.say("gain.unseen", sites=reading.listing([reading.name(site) for site in reading.held_out]))
        if (where == "unseen")
        else reading.say("gain.home")
    )


def difference_text(reading: Reading, found: Interval) -> str:
    """+0.034 [0.019, 0.050]."""
    if found["value"] is None:
        return reading.say("missing.not_estimable")
    if found["low"] is None or found["high"] is None:
        return signed(found["value"])
    return f"{signed(found['value'])} [{signed(found['low'])}, {signed(found['high'])}]"


def price_notes(
    reading: Reading, private: str, control: str, frozen: str, plain: str, *, trainable: str
) -> list[str]:
    """What the parts of a private arm's price are, and which arm is missing to tell them apart."""
    say, notes = reading.say, []
    if not reading.models_of(plain):
        notes.append(say("price.no_plain", arm=private, needed=plain))
    if not reading.models_of(control):
        notes.append(say("price.no_control", arm=private, plain=plain, needed=control))
    else:
        notes.append(say("price.control", control=control))
    if reading.models_of(frozen):
        notes.append(say("price.is_frozen", frozen=frozen, plain=plain, control=control))
    elif reading.models_of(control) and reading.models_of(plain):
        mixed = "price.nothing_frozen" if trainable == "all" else "price.frozen"
        notes.append(say(mixed, control=control, plain=plain, needed=frozen))
    return notes


def _turned(way: str) -> str:
    return {"higher": "lower", "lower": "higher"}.get(way, way)


def remarks(reading: Reading) -> list[str]:
    """What belongs under the headline: how far one held-out site reaches, what private training gains, which
    cells are missing, and whether any hospital is worse off.
    """
    say, lines = reading.say, []
    if of := reading.evaluation.get("evaluates"):
        lines.append(say("headline.evaluates", run=of["run"], trained=reading.listing(of["trained"])))
    if reading.held_out:
        count = len(reading.held_out)
        lines.append(say("headline.one_site") if count == 1 else say("headline.few_sites", count=count))
        lines += _at_chance(reading)
    lines += [*against_baseline(reading), *private_gain(reading), *_unlearned(reading)]
    for arm, other in ((FEDERATED, LOCAL), (FEDERATED_DP, PUBLIC)):
        found = {site: reading.contrast(arm, other, site) for site in reading.training}
        known = {site: difference for site, difference in found.items() if difference is not None}
        if not known:
            continue
        untrained = say("headline.untrained", other=other) if other == PUBLIC else other
        labels = {"arm": reading.label(arm), "other": untrained, "total": len(known)}
        below = [
            site
            for site, difference in known.items()
            if difference["value"] is not None and difference["value"] < 0
        ]
        certain = [site for site in below if verdict(known[site]) == "lower"]
        if not below:
            above = reading.listing([site for site in known if verdict(known[site]) == "higher"])
            above = above or say("headline.none_of_them")
            lines.append(say("headline.below.nowhere", above=above, **labels))
            continue
        named = reading.listing([f"{site} {signed(known[site]['value'] or 0.0)}" for site in below])
        lines.append(
            say(
                "headline.below",
                below=len(below),
                sites=named,
                certain=reading.listing(certain) or say("headline.none_of_them"),
                **labels,
            )
        )
    return lines


def swapped(reading: Reading) -> list[str]:
    """Hospitals and artifacts where models rank patients the wrong way round."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in reading.evaluation["below_chance"]:
        groups.setdefault((row["site"], row["artifact"]), []).append(f"{row['model']} {score(row['auroc'])}")
    looks = reading.evaluation["looks"]["below_chance"]
    return [
        reading.say(
            "headline.swapped",
            site=reading.name(site),
            artifact=reading.title(artifact),
            models=_some(reading, found),
            looks=looks,
        )
        for (site, artifact), found in groups.items()
    ]


def _estimable(reading: Reading) -> list[str]:
    """How many cells, of a site and an artifact, the scores average, and which are missing."""
    missing = reading.missing
    if not missing:
        return []
    total = len(reading.evaluation["averaged"]) * len(reading.artifacts)
    named = [f"{reading.title(gap['artifact'])} / {gap['site']} ({_why(reading, gap)})" for gap in missing]
    return [
        reading.say(
            "headline.cells", estimable=total - len(missing), total=total, missing=_some(reading, named)
        )
    ]


def _unlearned(reading: Reading) -> list[str]:
    """Models with outputs that nobody taught them: in their macro scores these count as 0.5."""
    return [
        reading.say(
            "headline.unlearned",
            model=reading.label(model),
            artifacts=reading.listing([reading.title(name) for name in reading.unlearned(model)]),
        )
        for model in reading.models
        if reading.unlearned(model)
    ]


def _why(reading: Reading, gap: Gap) -> str:
    if gap["n_pos"] is None:
        return reading.say("missing.noise")
    return f"n {gap['n_pos']} / {gap['n_neg']}"


def _some(reading: Reading, named: list[str]) -> str:
    """The first few, and how many more there are."""
    shown = named[:MAX_NAMED]
    more = [reading.say("list.more", count=len(named) - len(shown))] if len(named) > len(shown) else []
    return reading.listing([*shown, *more])


def _at_chance(reading: Reading) -> list[str]:
    """For the shared models, the artifacts on which a held-out site's interval includes 0.5: a macro score
    can hide them.
    """
    lines = []
    for arm in (FEDERATED, FEDERATED_DP):
        for site in reading.held_out:
            rows = reading.evaluation["metrics"].get(arm, {}).get(site, {})
            names = [
                f"{reading.title(name)} ({score(auroc)})"
                for name, row in rows.items()
                if (auroc := row["auroc"]) is not None
                and (low := row["low"]) is not None
                and (high := row["high"]) is not None
                and low <= 0.5 <= high
            ]
            if names:
                values = {
                    "site": reading.name(site),
                    "arm": reading.label(arm),
                    "artifacts": reading.listing(names),
                }
                lines.append(reading.say("headline.at_chance", **values))
    return lines


def privacy_banner(reading: Reading) -> Banner:
    """Loud where no private arm ran, or where the private arm has a hole; never known about the other
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
        if kinds and "hospital" not in kinds:
            named = [reading.word(kind) for kind in kinds]
            lines.append(say("privacy.none.no_patients", kinds=reading.listing(named, "or")))
        if reading.noised:
            lines += _scores(reading)
        return Banner(level="alarm", title=say("privacy.none.title"), lines=lines)
    given = [site for site, claim in reading.claims.items() if not claim["refused"]]
    if reading.unprotected or not given:
        sites = reading.listing(reading.unprotected or reading.training)
        void = [site for site in reading.unprotected if reading.claims[site].get("void")]
        why = [say("privacy.void", sites=reading.listing(void))] if void else []
        return Banner(
            level="alarm",
            title=say("privacy.hole.title", sites=sites),
            lines=[say("privacy.hole"), *why, *tags],
        )
    if others:
        mixed = say("privacy.mixed", others=reading.listing(others))
        return Banner(
            level="caution",
            title=say("privacy.mixed.title", private=reading.listing(private)),
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
    lines = [reading.say("privacy.scores_noised", sites=reading.listing(noised))] if noised else []
    if noised and exact:
        lines.append(reading.say("privacy.scores_exact_at", sites=reading.listing(exact)))
    return lines if noised else [reading.say("privacy.scores_exact")]


def _refusals(reading: Reading) -> list[str]:
    """Who refused the private arm, once a code and reason."""
    return [_refusal_line(reading, *row) for row in _refusal_groups(reading)]


def _refusal_groups(reading: Reading) -> list[tuple[str, str, list[str]]]:
    """Code, reason and who gave them."""
    groups: dict[tuple[str, str], list[str]] = {}
    for site, claim in reading.claims.items():
        if claim["refused"]:
            key = claim["refused"]["code"], claim["refused"]["reason"].rstrip(".")
            groups.setdefault(key, []).append(site)
    return [(code, reason, sites) for (code, reason), sites in groups.items()]


def _refusal_line(reading: Reading, code: str, reason: str, sites: list[str]) -> str:
    return reading.say("privacy.refused", sites=reading.listing(sites), code=code, reason=reason)


def not_measured(reading: Reading) -> list[str]:
    """Everything a reader might think was measured and was not, from this evaluation alone."""
    say, evaluation = reading.say, reading.evaluation
    lines = []
    kinds = sorted({site["kind"] for site in reading.sites})
    others = [site for site in reading.sites if site["kind"] != "hospital"]
    if "hospital" not in kinds:
        named = [reading.word(kind) for kind in kinds]
        lines.append(say("not.no_hospital", kinds=reading.listing(named, "or")))
    elif others:
        lines.append(
            say(
                "not.some_hospital",
                sites=reading.listing([f"{site['site']} ({reading.word(site['kind'])})" for site in others]),
            )
        )
    lines += [say("not.stand_in", sites=sites, text=text) for sites, text in reading.daggers]
    if len(reading.held_out) < 2:
        lines.append(say("not.one_unseen" if reading.held_out else "not.no_unseen"))
    lines.append(say("not.one_seed", seed=evaluation["seed"]))
    if len(reading.sites) > 1:
        lines.append(say("not.same_patient"))
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
        lines.append(say("not.data_changed", sites=reading.listing(changed)))
    if not reading.has_points:
        lines.append(say("not.points"))
    lines += [*_without_any(reading), say("not.readers"), say("not.severity")]
    if evaluation["private_arms"]:
        lines.append(say("not.audit"))
    return lines


def _without_any(reading: Reading) -> list[str]:
    """Sites that say nothing of any artifact, and why."""
    found = reading.evaluation.get("any_artifact")
    if found is None:
        return [reading.say("not.any")]
    if not found["artifacts"]:
        return []
    first, known = reading.models[0], {*reading.any_sites, *reading.noised}
    groups = {
        "noised": list(reading.noised),
        "unasked": [site for site in reading.evaluation["counts"] if site not in known],
        "blank": [site for site in reading.any_sites if not reading.performance(first, site, ANY).n],
    }
    return [
        reading.say(f"not.any.{key}", sites=reading.listing(sites)) for key, sites in groups.items() if sites
    ]


def _gaps(reading: Reading) -> list[str]:
    """Sites and artifacts without patients, or with too few."""
    say, lines = reading.say, []
    for site in [*reading.training, *reading.held_out]:
        if not reading.is_scored(site):
            lines.append(say("not.unscored", site=site))
            continue
        if site in reading.noised:
            lines.append(say("not.noised", site=site, tag=reading.noise_tag(site)))
            continue
        missing = [gap for gap in reading.missing if gap["site"] == site]
        for key, conjunction in (("n0", "and"), ("one_class", "or"), ("one_patient", "or")):
            if names := [reading.title(gap["artifact"]) for gap in missing if gap["reason"] == key]:
                lines.append(say(f"not.{key}", site=site, artifacts=reading.listing(names, conjunction)))
    if (common := reading.evaluation["common"]) is not None:
        lines.append(say("not.macro_differs" if common["artifacts"] else "not.macro_nothing_common"))
    return lines
