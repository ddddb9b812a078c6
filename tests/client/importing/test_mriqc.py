"""MRIQC's group table as site folders: a vector a scan, one site a hospital."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.agent.tasks import prepare
from client.data.cohort import load_cohort
from client.importing.mriqc import participant_of, rating_of
from client.simulation.phantom_sites import write_site
from common.cli import main
from common.errors import ConfigError, PlanError
from common.measures import LIMIT, public_vectors, scaled, scaling
from common.physics.appearance import SITE_APPEARANCES
from common.plan import parse_plan
from server.run import conduct
from tests.helpers.consortium import Consortium

NAMES = scaling().names
PATIENTS, HOSPITALS = 20, ("North", "South", "East")


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def made() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Three invented hospitals of 20 people, two scans of the first; a bad scan is off in 15 metrics."""
    rng = np.random.default_rng(1)
    mean, deviation = np.array(scaling().mean), np.array(scaling().deviation)
    iqms, ratings = [], []
    for site in HOSPITALS:
        for number in range(PATIENTS):
            bad = number % 3 == 0
            z = rng.standard_normal(len(NAMES))
            z[:15] += 2 * bad
            for session in ("1", "2") if number == 0 else ("1",):
                scan = f"sub-{site}{number:02d}_ses-{session}_T1w"
                values = dict(zip(NAMES, (mean + deviation * z).tolist(), strict=True))
                iqms.append({"bids_name": scan, "site": site, **values, "size_x": 256})
                ratings.append({"bids_name": scan, "rater_1": -1 if bad else 1, "rater_2": "n/a"})
    return iqms, ratings


def imported(tmp_path: Path, iqms: Any, ratings: Any, *more: str) -> int:
    left, right = table(tmp_path / "iqms.tsv", iqms), table(tmp_path / "ratings.tsv", ratings)
    words = [
        "data",
        "import",
        "mriqc",
        str(left),
        str(right),
        str(tmp_path / "out"),
        "--collection",
        "made up",
    ]
    with pytest.raises(SystemExit) as ended:
        main([*words, *(more or ("--sites", "site"))])
    return int(ended.value.code or 0)


def test_every_hospital_is_a_site_whose_patients_are_participants(tmp_path: Path) -> None:
    iqms, ratings = made()
    assert imported(tmp_path, iqms, ratings) == 0
    report = json.loads((tmp_path / "out" / "import.json").read_text(encoding="utf-8"))
    assert report["sites"]["north"] == {"patients": 20, "scans": 21, "unacceptable": 8, "acceptable": 13}
    assert sorted(report["sites"]) == ["east", "north", "south"]
    cohort = load_cohort(tmp_path / "out" / "north", labels=("quality",))
    assert cohort.images.shape == (21, len(NAMES))
    assert cohort.images.dtype == np.float32
    assert len(np.unique(cohort.patients)) == 20
    assert cohort.labels[:, 0].tolist() == [1, *(float(number % 3 == 0) for number in range(20))]
    row = np.array([[iqms[3][name] for name in NAMES]])
    np.testing.assert_allclose(cohort.images[3], scaled(row)[0])
    assert not list((tmp_path / "out").rglob("*.dcm"))


def test_scaling_is_of_the_public_table_and_never_of_the_site(tmp_path: Path) -> None:
    iqms, ratings = made()
    moved = [row | {name: row[name] + 2 * scaling().deviation[0] for name in NAMES[:1]} for row in iqms]
    assert imported(tmp_path, moved, ratings) == 0
    cohort = load_cohort(tmp_path / "out" / "south", labels=("quality",))
    assert cohort.images[:, 0].mean() > 1.5, "a site that differs stays different"
    assert np.abs(scaled(np.full((1, len(NAMES)), 1e12))).max() == LIMIT
    assert abs(float(public_vectors(4000, 1).mean())) < 0.01


def broken(case: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    iqms, ratings = made()
    match case:
        case "no metric":
            iqms = [{name: value for name, value in row.items() if name != "efc"} for row in iqms]
        case "no key":
            iqms = [{name: value for name, value in row.items() if name != "bids_name"} for row in iqms]
        case "no rating":
            ratings = [{"bids_name": row["bids_name"], "note": "fine"} for row in ratings]
        case "one patient":
            iqms[5]["site"] = "West"
        case "other scans":
            ratings = [row | {"bids_name": "x" + row["bids_name"]} for row in ratings]
        case "twice":
            iqms.append(iqms[3])
        case "rated twice":
            ratings.append(ratings[3])
        case "nan":
            iqms[4]["fber"] = "nan"
        case "a word":
            ratings[2]["rater_1"] = "good"
        case "no hospital":
            iqms[7]["site"] = ""
    return iqms, ratings


@pytest.mark.parametrize(
    ("case", "code", "words"),
    [
        ("no metric", "bad-measures", "metric efc is missing"),
        ("no key", "bad-measures", "no column that names the scans"),
        ("no rating", "bad-measures", "no column of ratings"),
        ("one patient", "too-few-patients", "site west has one patient"),
        ("other scans", "labels-match-nothing", "none of its 63 scans"),
        ("twice", "bad-measures", "second of scan sub-North02"),
        ("rated twice", "bad-measures", "second of scan sub-North02"),
        ("nan", "bad-measures", "row 6, fber: nan"),
        ("a word", "bad-label", "'good' is no rating"),
        ("no hospital", "bad-measures", "nothing in site"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(
    case: str, code: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert imported(tmp_path, *broken(case)) != 0
    error, hint = capsys.readouterr().err.splitlines()
    assert f"[{code}]" in error
    assert words in error
    assert "hint: " in hint
    assert not (tmp_path / "out").exists()


def test_ratings_are_binarized_as_mriqc_does() -> None:
    found = {
        text: rating_of(text, Path("r"), "s", "rater_1") for text in ("-1", "0.0", "1", "n/a", "exclude")
    }
    assert found == {"-1": 1, "0.0": 0, "1": 0, "n/a": None, "exclude": 1}
    assert [participant_of(name) for name in ("sub-12_ses-1_T1w", "50002")] == ["12", "50002"]


def plan_of(name: str, **more: Any) -> Any:
    values: dict[str, Any] = {
        "name": "metrics",
        "arms": ["federated", "local"],
        "held_out": ["east"],
        "model": {"name": name, "initial": "random", "labels": ["quality"]},
        "training": {"rounds": 2, "local_epochs": 20, "learning_rate": 0.05},
        "split": {"train": 0.6, "test": 0.4},
    }
    return parse_plan(values | more)


@pytest.mark.parametrize("name", ["iqm_linear", "iqm_mlp"])
def test_a_run_over_metrics_learns_what_a_bad_scan_is(name: str, tmp_path: Path) -> None:
    """Through the same sites, messages and report as images; the held-out hospital is scored as well."""
    assert imported(tmp_path, *made()) == 0
    folder = Consortium(data=tmp_path / "out", names=("east", "north", "south")).conduct(
        plan_of(name), tmp_path / "run"
    )
    found = folder.evaluation
    assert list(found["matrix"]["federated"]["east"]) == ["quality"]
    assert found["matrix"]["federated"]["east"]["quality"]["auroc"] > 0.9
    assert found["matrix"]["federated"]["east"]["quality"]["n_pos"] == 7


def test_images_and_metrics_are_not_mixed_up(tmp_path: Path) -> None:
    assert imported(tmp_path, *made()) == 0
    write_site(tmp_path / "images", "images", SITE_APPEARANCES[0], patients=2, seed=1)
    pairs = (
        (tmp_path / "out" / "north", parse_plan({"name": "x"})),
        (tmp_path / "images", plan_of("iqm_mlp")),
    )
    for site, plan in pairs:
        with pytest.raises(ConfigError, match="is not for these"):
            prepare(site, plan)
    with pytest.raises(PlanError, match=r"training\.inject is of images"):
        plan_of("iqm_linear", training={"inject": {}})


def test_a_private_head_on_metrics_starts_from_numbers_of_nobody(tmp_path: Path) -> None:
    """It is all of the network: no frozen part lies below it, which a site could take for a known model."""
    assert imported(tmp_path, *made()) == 0
    plan = plan_of("iqm_linear", arms=["federated", "federated_dp"], privacy={"steps_per_round": 1})
    consortium = Consortium(data=tmp_path / "out", names=("east", "north", "south"))
    found = consortium.conduct(plan, tmp_path / "run").evaluation
    assert {site: claim["refused"] for site, claim in found["privacy"].items()} == {
        "north": None,
        "south": None,
    }
    with pytest.raises(PlanError, match="trains a head on public features"):
        plan_of("iqm_mlp", arms=["federated_dp"])


def test_a_private_arm_refuses_numbers_that_are_not_those_of_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else patients could have shaped what is called random."""
    assert imported(tmp_path, *made()) == 0
    plan = plan_of("iqm_linear", arms=["federated", "federated_dp"], privacy={"steps_per_round": 1})
    honest = conduct.initial_weights
    monkeypatch.setattr(conduct, "initial_weights", lambda *words: honest(*words) + np.float32(0.01))
    consortium = Consortium(data=tmp_path / "out", names=("east", "north", "south"))
    found = consortium.conduct(plan, tmp_path / "run").evaluation
    refused = {site: claim["refused"] for site, claim in found["privacy"].items()}
    assert {site: one and one["code"] for site, one in refused.items()} == {
        "north": "crafted-model",
        "south": "crafted-model",
    }
