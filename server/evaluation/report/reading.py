"""Look up values in evaluation.json for the page: sites, models, what is missing and why, what is private."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from common.any_artifact import ANY
from common.arms import ARMS
from common.artifacts import ARTIFACTS, INDEX, modality_text
from common.counts import BINS, DISCLOSED_BINS, NOISED_BINS, Counts
from common.i18n import Say
from common.privacy import epsilon_text
from server.evaluation.estimates import trained_at
from server.evaluation.noised import NoisedCounts
from server.evaluation.operating import Performance, Point, noised_performance, performance, point_of
from server.evaluation.report.numerals import plain
from server.evaluation.report.words import ENGLISH
from server.evaluation_file import (
    ArtifactRow,
    Claim,
    Contrast,
    Evaluation,
    Gap,
    Score,
    SiteRow,
    Worst,
    artifacts_of,
)

TRAINED = tuple(name for name, arm in ARMS.items() if arm.is_trained)
"""Arms that learn from sites' patients."""


@dataclass(frozen=True)
class Reading:
    """One run's evaluation. Holds no number that evaluation.json does not."""

    evaluation: Evaluation
    say: Say
    language: str = "en"

    # sites

    @cached_property
    def sites(self) -> list[SiteRow]:
        """Training sites first."""
        return sorted(self.evaluation["sites"], key=lambda site: site["role"] == "held_out")

    @cached_property
    def training(self) -> list[str]:
        return [site["site"] for site in self.sites if site["role"] == "training"]

    @cached_property
    def held_out(self) -> list[str]:
        return [site["site"] for site in self.sites if site["role"] == "held_out"]

    @cached_property
    def stand_ins(self) -> dict[str, str]:
        return {site["site"]: site["stand_in"] for site in self.sites if site["stand_in"]}

    @cached_property
    def daggers(self) -> list[tuple[str, str]]:
        """Sites that share a stand-in, and what it is."""
        texts = dict.fromkeys(self.stand_ins.values())
        return [
            (self.listing([site for site, said in self.stand_ins.items() if said == text]), text.rstrip("."))
            for text in texts
        ]

    def kind(self, site: str) -> str:
        return self.word(next(str(about["kind"]) for about in self.sites if about["site"] == site))

    def name(self, site: str) -> str:
        """With a dagger where patients are not persons."""
        return f"{site} †" if site in self.stand_ins else site

    def is_scored(self, site: str) -> bool:
        return site in self.evaluation["counts"]

    @cached_property
    def noised(self) -> dict[str, dict[str, Any]]:
        """Sites that were scored with noise, and its price."""
        scoring = self.evaluation.get("scoring", {})
        return {
            site["site"]: found
            for site in self.sites
            if (found := scoring.get(site["site"], {})) and found["mode"] == "dp"
        }

    @cached_property
    def sizes(self) -> dict[str, dict[str, tuple[int, int]]]:
        """site -> artifact -> test patients with and without it, of the sites scored exactly; the same for
        every model.
        """
        return {
            site: {name: (rows["n_pos"] or 0, rows["n_neg"] or 0) for name, rows in at_sites[site].items()}
            for at_sites in list(self.evaluation["matrix"].values())[:1]
            for site in at_sites
            if site not in self.noised
        }

    def patients(self, site: str, artifact: str) -> str | None:
        """Test patients with / without an artifact, as text; of a site scored with noise an estimate, by the
        counts of the first model. None: the site was not scored.
        """
        if site in self.noised:
            row = next(iter(self.evaluation["matrix"].values()))[site][artifact]
            spread = f"{row['n_deviation']:.0f}"
            return self.say(
                "sites.estimate", pos=row["n_pos_estimate"], neg=row["n_neg_estimate"], spread=spread
            )
        pair = self.sizes.get(site, {}).get(artifact)
        return None if pair is None else f"{pair[0]} / {pair[1]}"

    def noise_tag(self, site: str) -> str:
        """Says that a site was scored with noise, and its price; empty for others."""
        found = self.noised.get(site)
        return self.say("noised.tag", epsilon=epsilon_text(found["epsilon"])) if found else ""

    def averaged(self, site: str) -> list[str]:
        """The artifacts in a site's macro AUROC."""
        return self.evaluation["averaged"].get(site, [])

    def macro_note(self, site: str) -> str:
        """Which artifacts a site's macro AUROC averages, where not all, and whether it was scored with
        noise.
        """
        notes = [self.noise_tag(site)] if site in self.noised else []
        without = [self.title(name) for name in self.artifacts if name not in self.averaged(site)]
        if self.is_scored(site) and without:
            notes.append(self.say("sites.macro_without", artifacts=self.listing(without)))
        return "; ".join(notes)

    def trained_at(self, model: str, site: str) -> bool:
        """Whether a site's patients trained a model."""
        return trained_at(model, site, self.training)

    def unlearned(self, model: str) -> list[str]:
        """The outputs of a model that nobody taught it."""
        return self.evaluation.get("unlearned", {}).get(model, [])

    # arms and models

    @property
    def arms(self) -> list[str]:
        return list(self.evaluation["arms"])

    @property
    def models(self) -> list[str]:
        return list(self.evaluation["matrix"])

    def models_of(self, arm: str) -> list[str]:
        return [model for model in self.models if model == arm or model.startswith(f"{arm}/")]

    def model_at(self, arm: str, site: str) -> str | None:
        """The arm's model that a hospital would use: the shared one, or its own."""
        return next((model for model in (f"{arm}/{site}", arm) if model in self.models), None)

    def counts(self, site: str, model: str) -> Counts:
        """The exact counts of a site that was scored without noise."""
        if (site, model) not in self._counts:
            found = Counts.from_json(self.evaluation["counts"][site][model])
            self._counts[site, model] = replace(found, bins=self.bins(site))
        return self._counts[site, model]

    @cached_property
    def _counts(self) -> dict[tuple[str, str], Counts]:
        return {}

    def noised_counts(self, site: str, model: str) -> NoisedCounts:
        """The counts of a site that was scored with noise."""
        rows = self.evaluation["counts"][site][model]
        none = {"positives": [0] * NOISED_BINS, "negatives": [0] * NOISED_BINS}
        positives, negatives = (
            np.array([rows.get(name, none)[kind] for name in self.outputs], np.int64)
            for kind in ("positives", "negatives")
        )
        deviation = float(self.noised[site]["deviation"])
        return NoisedCounts(positives=positives, negatives=negatives, deviation=deviation)

    def bins(self, site: str) -> int:
        """In how many bins a site counted."""
        mode = self.evaluation["scoring"].get(site, {}).get("mode", "synthetic")
        return {"dp": NOISED_BINS, "disclosed": DISCLOSED_BINS}.get(mode, BINS)

    # operating points

    @property
    def has_points(self) -> bool:
        """Whether the scores of the coordinator's public patients were kept; earlier versions did not."""
        return bool(self.evaluation.get("public_counts"))

    def point(self, model: str, artifact: str, bins: int = BINS) -> Point | None:
        """The operating point of a model among the edges of `bins` bins; None where too few public
        patients are known.
        """
        key = model, artifact, bins
        if key not in self._points:
            public, edges = self._public(model, artifact)
            between = None if edges is None else np.array(edges)
            self._points[key] = (
                None if public is None else point_of(public, self.number(artifact), between, bins)
            )
        return self._points[key]

    @cached_property
    def _points(self) -> dict[tuple[str, str, int], Point | None]:
        return {}

    def _public(self, model: str, artifact: str) -> tuple[Counts | None, list[float] | None]:
        """The public patients, and the quantiles of their scores; None where they were not kept."""
        if artifact == ANY:
            kept = self.evaluation.get("any_public", {}).get(model)
            return (Counts.from_json({ANY: kept["counts"]}, [ANY]), kept["edges"]) if kept else (None, None)
        if model not in self.evaluation.get("public_counts", {}):
            return None, None
        if model not in self._public_counts:
            self._public_counts[model] = Counts.from_json(self.evaluation["public_counts"][model])
        return self._public_counts[model], self.evaluation.get("edges", {}).get(model, {}).get(artifact)

    @cached_property
    def _public_counts(self) -> dict[str, Counts]:
        return {}

    @property
    def any_sites(self) -> list[str]:
        """Sites that counted the patients with any artifact, in the order of the page."""
        counted = self.evaluation.get("any_artifact", {}).get("counts", {})
        return [site["site"] for site in self.sites if site["site"] in counted]

    @property
    def any_artifacts(self) -> str:
        """Which artifacts are combined, where a site counted the patients with any; else empty."""
        names = self.evaluation["any_artifact"]["artifacts"] if self.any_sites else []
        return self.listing([self.title(name) for name in names], "or") if names else ""

    def any_counts(self, site: str, model: str) -> Counts:
        """Patients with and without any artifact, one row."""
        kept = self.evaluation["any_artifact"]["counts"][site][model]
        return replace(Counts.from_json({ANY: kept}, [ANY]), bins=self.bins(site))

    def auroc_row(self, model: str, site: str, artifact: str) -> ArtifactRow:
        """The AUROC of an artifact, or of any, with its interval."""
        if artifact == ANY:
            return self.evaluation["any_artifact"]["matrix"][model][site]
        return self.evaluation["matrix"][model][site][artifact]

    def performance(self, model: str, site: str, artifact: str) -> Performance:
        """What a model does at a scored site at its operating point."""
        key = model, site, artifact
        if key not in self._performances:
            point = self.point(model, artifact, self.bins(site))
            if artifact == ANY:
                found = performance(self.any_counts(site, model), 0, point)
            elif site in self.noised:
                found = noised_performance(self.noised_counts(site, model), self.number(artifact), point)
            else:
                found = performance(self.counts(site, model), self.number(artifact), point)
            self._performances[key] = found
        return self._performances[key]

    @cached_property
    def _performances(self) -> dict[tuple[str, str, str], Performance]:
        return {}

    # scores

    def score(self, arm: str, where: str) -> Score | None:
        """Home, elsewhere, unseen or one site; None where it was not estimated."""
        found = self.evaluation["scores"].get(arm, {}).get(where)
        if (
            (found is None or found["value"] is None)
            and self.held_out == [where]
            and len(self.models_of(arm)) > 1
        ):
            found = self.evaluation["scores"][arm]["unseen"]
        return found if found and found["value"] is not None else None

    def worst(self, arm: str) -> Worst | None:
        """The training site with the lowest score on the artifacts that all have in common."""
        found = self.evaluation["worst"].get(arm)
        return found if found and found["value"] is not None else None

    def why_missing(self, where: str, arm: str = "") -> str:
        """Why there is no score at a site, or at `home`, `elsewhere`, `unseen`, `worst`; never a number.

        Args:
            arm: a shared one has no `elsewhere`.
        """
        if where == "elsewhere" and arm and self.models_of(arm) == [arm]:
            return self.say("missing.trained_there")
        worst = self.evaluation["worst"].get(arm)
        if where == "worst" and worst is not None and not worst["of"]:
            return self.say("missing.nothing_common")
        if where == "unseen" and not self.held_out:
            return self.say("missing.no_held_out")
        sites = {
            "unseen": self.held_out,
            "home": self.training,
            "elsewhere": self.training,
            "worst": self.training,
        }.get(where, [where])
        reasons = {self._why_no_score(site) for site in sites}
        return reasons.pop() if len(reasons) == 1 else self.say("missing.not_estimable")

    def _why_no_score(self, site: str) -> str:
        if not self.is_scored(site):
            return self.say("missing.unscored")
        if site in self.noised:
            return self.say("missing.noise")
        if not any(sum(pair) for pair in self.sizes.get(site, {}).values()):
            return self.say("missing.n0")
        return self.say("missing.not_estimable")

    @cached_property
    def crowded(self) -> list[tuple[str, str]]:
        """Sites and artifacts whose coarse bins hold more than a fifth of a class in one, for some model."""
        found = {
            (site, artifact): None
            for at_sites in self.evaluation["matrix"].values()
            for site, rows in at_sites.items()
            for artifact, row in rows.items()
            if row.get("crowded")
        }
        return list(found)

    def unit_notes(self) -> list[str]:
        """What has one score, a patient or a study, by site; a site that did not say is not named."""
        units: dict[str, list[str]] = {}
        for site in self.sites:
            if unit := site.get("unit"):
                units.setdefault(unit, []).append(self.name(site["site"]))
        return [
            self.say(
                f"unit.{unit}" if f"unit.{unit}" in ENGLISH else "unit.other",
                sites=self.listing(at),
                unit=unit,
            )
            for unit, at in units.items()
        ]

    @cached_property
    def below_chance(self) -> frozenset[tuple[str, str, str]]:
        """(site, model, artifact) of the AUROCs significantly below 0.5."""
        rows = self.evaluation["below_chance"]
        return frozenset((row["site"], row["model"], row["artifact"]) for row in rows)

    def contrast(self, arm: str, other: str, where: str) -> Contrast | None:
        for found in self.evaluation["contrasts"]:
            if (found["arm"], found["other"], found["where"]) == (arm, other, where):
                return found if found["value"] is not None else None
        return None

    # privacy

    def is_private(self, arm: str) -> bool:
        return arm in self.evaluation["private_arms"]

    @property
    def claims(self) -> dict[str, Claim]:
        return dict(self.evaluation["privacy"])

    @property
    def unprotected(self) -> list[str]:
        """Sites whose updates the private arm used without a finite epsilon."""
        return [
            site for site, claim in self.claims.items() if not claim["refused"] and claim["epsilon"] is None
        ]

    def privacy_tag(self, arm: str) -> str:
        """What stands beside every score of the arm: epsilon, delta, unit and adjacency, or that there is
        none.
        """
        if arm == "public":
            return self.say("privacy.untouched")
        if not self.is_private(arm):
            return self.say("privacy.not_private")
        given = [claim for claim in self.claims.values() if not claim["refused"]]
        if not given or self.unprotected:
            return self.say("privacy.tag.none")
        return self.say(
            "privacy.tag",
            epsilon=self._epsilon(),
            delta=plain(max(claim["delta"] or 0.0 for claim in given)),
            unit=self._units(),
            adjacency=self.word(given[0]["adjacency"]),
        )

    def short_tag(self, arm: str) -> str:
        """The same for a figure; empty for an arm that is not private."""
        if not self.is_private(arm):
            return ""
        epsilon = self._epsilon()
        if not epsilon:
            return self.say("privacy.tag.none")
        short, units = self.say("privacy.tag.short", epsilon=epsilon), self._units()
        return short if units == self.word("patient") else f"{short} / {units}"

    def label(self, model: str) -> str:
        """A model's or arm's name with its epsilon, for figures."""
        tag = self.short_tag(model)
        return f"{model} ({tag})" if tag else model

    def _units(self) -> str:
        """The units of privacy of the sites that took part: `patient`, `study`, or `patient or study`."""
        units = sorted({claim["unit"] for claim in self.claims.values() if not claim["refused"]})
        return self.listing([self.word(unit) for unit in units], "or")

    def _epsilon(self) -> str:
        spent = [
            claim["epsilon"]
            for claim in self.claims.values()
            if not claim["refused"] and claim["epsilon"] is not None
        ]
        if not spent or self.unprotected:
            return ""
        low, high = epsilon_text(min(spent)), epsilon_text(max(spent))
        return high if low == high else self.say("privacy.tag.range", low=low, high=high)

    # words about names

    def describe(self, kind: str, arm: str) -> str:
        """A sentence about an arm, `kind` being `arm` or `who`; a general one for an arm without its own."""
        key = f"{kind}.{arm}"
        return self.say(key if key in ENGLISH else f"{kind}.other", arm=arm)

    def where(self, where: str) -> str:
        key = f"where.{where}"
        return self.say(key) if key in ENGLISH else self.name(where)

    def listing(self, items: Sequence[str], conjunction: str = "and") -> str:
        """a, b and c; or with `or`."""
        if len(items) < 2:
            return "".join(items)
        first = self.say("list.separator").join(items[:-1])
        return self.say(f"list.{conjunction}", first=first, last=items[-1])

    def word(self, word: str) -> str:
        """A word of evaluation.json, such as a kind of site, in the page's language."""
        return self.say(f"word.{word}") if f"word.{word}" in ENGLISH else word

    def title(self, artifact: str) -> str:
        """`chemical_shift` as a person writes it."""
        if artifact == ANY:
            return self.say("any.title")
        if self.language == "zh" and artifact in INDEX:
            return ARTIFACTS[INDEX[artifact]].chinese
        return artifact.replace("_", " ")

    def with_modality(self, artifact: str) -> str:
        if artifact == ANY:
            return self.title(artifact)
        return f"{self.title(artifact)} ({modality_text(artifact)})"

    # artifacts

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """The outputs of the run's models, in the order of the vocabulary."""
        return artifacts_of(self.evaluation)

    @cached_property
    def artifacts(self) -> list[str]:
        """Of these, the artifacts that any site has patients assessed for."""
        known = {
            artifact
            for at_sites in self.evaluation["matrix"].values()
            for site, rows in at_sites.items()
            for artifact, row in rows.items()
            if site in self.noised or row["n_pos"] or row["n_neg"]
        }
        return [name for name in self.outputs if name in known]

    def number(self, artifact: str) -> int:
        """Its place among a model's outputs; any artifact has counts of its own, of one row."""
        return 0 if artifact == ANY else self.outputs.index(artifact)

    @cached_property
    def missing(self) -> list[Gap]:
        """The artifacts that are in no macro score of a site, of those that any site has."""
        return [gap for gap in self.evaluation["missing"] if gap["artifact"] in self.artifacts]
