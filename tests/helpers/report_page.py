"""An evaluation.json on random scores, and what a test reads of the page made from it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np

from client.agent.evaluation import subgroup_sums
from common.any_artifact import ANY, any_label, any_score
from common.arms import is_private
from common.artifacts import DEFAULT_LABELS, can_occur
from common.counts import EDGES, Counts, auroc_covariance
from common.plan import RunPlan
from common.subgroups import LEVELS, PLACE
from server.evaluation.estimates import SiteScores, Study, report_numbers
from server.evaluation_file import SCHEMA
from server.run_folder import without_nan

TRAINING, HELD_OUT = ("alder", "birch", "cedar"), ("dune",)
ARMS = ("public", "local", "federated", "federated_dp", "pooled")
SKILL = {
    "public": 0.8,
    "local": 1.2,
    "local_dp": 0.9,
    "federated": 1.7,
    "federated_clipped": 1.0,
    "federated_dp": 0.95,
    "pooled": 1.8,
}
EVEN = np.tile(np.linspace(-3, 3, EDGES), (len(DEFAULT_LABELS), 1))
ANY_EDGES = np.linspace(-1, 5, EDGES)
STAND_IN = "one computed phantom stands for one patient"
REFUSAL = {"code": "epsilon-cap", "reason": "the policy allows epsilon 3 a run"}
HOSTILE = "<script>alert('x')</script>&\"{{ 7 * 7 }}{plan}"


def site_scores(
    models: list[str], seed: int, patients: int, empty: str = "", only_negative: str = ""
) -> SiteScores:
    """Random patients, half CT and half MR; models share most of their mistakes, as real ones do."""
    rng = np.random.default_rng(seed)
    is_ct = rng.random(patients) < 0.5
    labels = (rng.random((patients, len(DEFAULT_LABELS))) < 0.4).astype(float)
    for number, artifact in enumerate(DEFAULT_LABELS):
        labels[is_ct != can_occur(artifact, "CT"), number] = np.nan
        if artifact == empty:
            labels[:, number] = np.nan
        if artifact == only_negative:
            labels[labels[:, number] == 1, number] = 0.0
    common = rng.normal(0, 0.9, labels.shape)
    logits = []
    for model in models:
        skill = SKILL[model.partition("/")[0]] + rng.normal(0, 0.15)
        logits.append(np.nan_to_num(labels) * skill + common + rng.normal(0, 0.5, labels.shape))
    could = np.array([[can_occur(name, "CT" if ct else "MR") for name in DEFAULT_LABELS] for ct in is_ct])
    of_any, edges = any_label(labels, could)[:, None], EVEN
    member = np.zeros((*labels.shape, len(LEVELS)), bool)
    for place in range(2):
        member[place::2, :, place] = True  # Siemens or GE
    member[:2, :, PLACE["sex", "female"]] = True
    return SiteScores(
        counts={model: Counts.of(scores, labels) for model, scores in zip(models, logits, strict=True)},
        covariance=auroc_covariance(logits, labels),
        subgroups={
            model: subgroup_sums([scores], labels, member, EVEN[None])[0]
            for model, scores in zip(models, logits, strict=True)
        },
        any_counts={
            model: Counts.of(any_score(scores, could, edges)[:, None], of_any, ANY_EDGES[None])
            for model, scores in zip(models, logits, strict=True)
        },
    )


def public_counts(models: list[str], seed: int) -> dict[str, Any]:
    """The coordinator's public patients by model."""
    return {model: counts.to_json() for model, counts in site_scores(models, seed + 90, 300).counts.items()}


def any_public(models: list[str], seed: int) -> dict[str, Any]:
    """The same patients with and without any artifact."""
    found = site_scores(models, seed + 90, 300).any_counts
    return {
        model: {"edges": ANY_EDGES.tolist(), "counts": counts.to_json([ANY])[ANY]}
        for model, counts in found.items()
    }


def evaluation_of(
    arms: tuple[str, ...] = ARMS,
    *,
    refused: tuple[str, ...] = (),
    held_out: tuple[str, ...] = HELD_OUT,
    kind: str = "synthetic",
    seed: int = 7,
    public: bool = True,
    training: tuple[str, ...] = TRAINING,
) -> dict[str, Any]:
    """What server.app writes, on random scores. birch has no chemical_shift patients, cedar none with
    metal.

    Args:
        public: with the coordinator's public patients, as this version writes it.
    """
    private = [arm for arm in arms if is_private(arm) and set(refused) != set(training)]
    models = [
        model
        for arm in arms
        for model in ([f"{arm}/{site}" for site in training] if arm.startswith("local") else [arm])
        if not is_private(arm) or private
    ]
    gaps = [
        {"patients": 110},
        {"patients": 90, "empty": "chemical_shift"},
        {"patients": 100, "only_negative": "metal"},
    ]
    sites = {
        site: site_scores(models, seed + number, **gaps[number % len(gaps)])  # type: ignore[arg-type]
        for number, site in enumerate(training)
    } | {
        site: site_scores(models, seed + len(training) + number, 240) for number, site in enumerate(held_out)
    }
    study = Study(sites=sites, training=training, held_out=held_out, models=models)
    numbers = report_numbers(study, arms)
    unit = {"unit": "patient", "adjacency": "add/remove"}
    claim = unit | {
        "epsilon": 7.9021,
        "epsilon_pld": 7.311,
        "delta": 1e-5,
        "noise_multiplier": 1.3104,
        "refused": None,
    }
    nothing = unit | {
        "epsilon": None,
        "epsilon_pld": None,
        "delta": None,
        "noise_multiplier": None,
        "refused": REFUSAL,
    }
    rng = np.random.default_rng(seed)
    curves = {
        model: [
            {
                "round": step,
                "loss": 0.65 - gain * (1 - 0.6**step) + rng.normal(0, 0.005),
                "auroc": 0.7 + gain * (1 - 0.6**step),
            }
            for step in range(7)
        ]
        for model in models
        if model != "public"
        for gain in [0.12 * SKILL[model.partition("/")[0]] + rng.normal(0, 0.01)]
    }
    values = {
        "schema": SCHEMA,
        "run": "demo-7-20260101T000000Z",
        "plan": "demo",
        "question": "Does a federated artifact classifier generalize to a hospital it has never seen?",
        "seed": seed,
        "status": "partial" if refused else "completed",
        "rounds": 6,
        "epochs": 6,
        "arms": list(arms),
        "private_arms": private,
        "sites": [
            {
                "site": site,
                "kind": kind,
                "role": "held_out" if site in held_out else "training",
                "nominal_patients": 200,
                "stand_in": STAND_IN if kind == "synthetic" else "",
                "version": "0.1.0",
            }
            for site in (*training, *held_out)
        ],
        "privacy": {site: nothing if site in refused else claim for site in training}
        if "federated_dp" in arms
        else {},
        "curves": curves,
        "chosen_rounds": dict.fromkeys(curves, 6),
        "refusals": [f"federated_dp: refused: {REFUSAL['reason']}"] if set(refused) == set(training) else [],
        "incomplete": [f"federated_dp: {site} refused" for site in refused] if private else [],
        **(
            {"public_counts": public_counts(models, seed), "any_public": any_public(models, seed)}
            if public
            else {}
        ),
        **numbers,
        "cpu_seconds": 182.4,
        "seconds": 101.0,
    }
    return json.loads(json.dumps(without_nan(values)))


MANIFEST = {  # type: ignore[var-annotated]
    "run": "demo-7-20260101T000000Z",
    "status": "completed",
    "plan_sha256": "ab" * 32,
    "initial_sha256": None,
    "seed": 7,
    "threads": 2,
    "versions": {"fedqc": "0.1.0", "torch": "2.13.0"},
    "sites": [],
}
PLAN = RunPlan(name="demo", arms=ARMS, held_out=HELD_OUT)


class Texts(HTMLParser):
    """Tags with their attributes, and the text of each table cell."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", " ".join(Texts(page).text))


def section(page: str, name: str) -> str:
    return page.split(f'<section id="{name}">')[1].split("</section>", maxsplit=1)[0]


def tables(fragment: str) -> list[list[list[str]]]:
    """Table -> rows -> texts of cells, for tables without spans."""
    return [
        [
            [text_of(cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)]
            for row in re.findall(r"<tr>.*?</tr>", table, re.S)
        ]
        for table in re.findall(r"<table.*?</table>", fragment, re.S)
    ]
