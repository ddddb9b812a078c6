"""`fedqc site use`: a worse model is refused, a better one accepted, and the former one comes back."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from client.predict import acceptance, operating_point
from client.predict.acceptance import (
    Answers,
    Comparison,
    check_constancy,
    check_is_due,
    compare,
    examine,
    put_to_use,
)
from client.predict.model import START, find_model
from client.predict.operating_point import NONE
from client.simulation.phantom_sites import write_site
from client.site import model_in_use
from common.artifacts import NAMES
from common.errors import ConfigError, DataError, RefusedError
from common.model_file import labels_said, save_model
from common.physics.appearance import SITE_APPEARANCES
from common.weights import flatten, manifest_of, resolve_initial
from tests.helpers.command_line import typed

GOOD = resolve_initial(START, None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site of phantoms with its images prepared."""
    site = tmp_path_factory.mktemp("acceptance") / "site"
    write_site(site, "site", SITE_APPEARANCES[0], patients=60, seed=4)
    acceptance.load_cohort(site)
    return site


@pytest.fixture
def site(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(operating_point, "_on_phantoms", lambda *how: NONE)
    monkeypatch.setattr(operating_point, "LEAST_PATIENTS", 4)
    return Path(shutil.copytree(made, tmp_path / "site"))


@pytest.fixture
def poor(tmp_path: Path) -> Path:
    """The public start with a head that answers at random."""
    start = find_model(START, None)
    state = start.network.state_dict()
    state["head.weight"] = state["head.weight"].flip(1)
    path = tmp_path / "poor.safetensors"
    save_model(path, flatten(state), manifest_of(state), {"run": "poor"} | labels_said(start.labels))
    return path


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_worse_model_is_refused_and_that_is_noted(site: Path, poor: Path) -> None:
    tested = examine(str(poor), site, "Dr. Weber")
    assert tested.present.origin == "start"
    with pytest.raises(RefusedError) as caught:
        put_to_use(tested, site, "Dr. Weber")
    assert caught.value.code == "worse-model"
    (entry,) = model_in_use.entries(site / "state")
    assert (entry["action"], entry["by"], entry["model"]) == ("refuse", "Dr. Weber", sha(poor))
    assert entry["figures"]["worse"]
    assert find_model(None, site / "state").origin == "start"


def test_a_better_model_is_accepted_and_the_former_comes_back_byte_for_byte(site: Path, poor: Path) -> None:
    state = site / "state"
    model_in_use.note(
        state, "use", by="an earlier version", model=model_in_use.keep(state, poor.read_bytes())
    )
    assert find_model("latest", state).sha256 == sha(poor)
    tested = examine(str(GOOD), site, "Dr. Weber")
    entry = put_to_use(tested, site, "Dr. Weber")
    figures = entry["figures"]
    assert figures["model"]["all"]["found"] > figures["in_use"]["all"]["found"]
    assert (entry["model"], entry["former"]) == (sha(GOOD), sha(poor))
    assert abs(datetime.now().astimezone() - datetime.fromisoformat(entry["at"])) < timedelta(minutes=5)
    assert find_model(None, state).sha256 == sha(GOOD)
    assert find_model(None, state).privacy.basis == "no hospital's patients", "it is the public start"
    model_in_use.roll_back(state, "Dr. Berg")
    back = model_in_use.in_use(state)
    assert back is not None
    assert model_in_use.file_of(state, back["model"]).read_bytes() == poor.read_bytes()
    assert [(one["action"], one["by"]) for one in model_in_use.entries(state)] == [
        ("use", "an earlier version"),
        ("use", "Dr. Weber"),
        ("rollback", "Dr. Berg"),
    ]


def test_a_received_model_changes_nothing_until_it_is_accepted(site: Path, poor: Path) -> None:
    """Before, `predict` used whatever the last run had left."""
    models = site / "state" / "models"
    models.mkdir()
    shutil.copy(GOOD, models / "a.safetensors")
    (models / "latest.safetensors").symlink_to("a.safetensors")
    assert find_model(None, site / "state").origin == "start"
    with pytest.raises(ConfigError) as caught:
        find_model("latest", site / "state")
    assert caught.value.code == "no-model"
    put_to_use(examine("latest", site, "W"), site, "W")
    shutil.copy(poor, models / "b.safetensors")  # the next run
    (models / "latest.safetensors").unlink()
    (models / "latest.safetensors").symlink_to("b.safetensors")
    found = find_model("latest", site / "state")
    assert (found.origin, found.sha256) == ("in-use", sha(GOOD))


def test_the_cases_are_labelled_test_patients_and_stay_what_they_are(site: Path) -> None:
    acceptance.freeze_cases(site, "W", size=128)
    cases = acceptance.read_cases(site, size=128)
    cohort = acceptance.load_cohort(site)
    tests = {record.patient for record, part in zip(cohort.records, cohort.part, strict=True) if part == 2}
    assert set(cases.names) == tests
    put_to_use(examine(str(GOOD), site, "W"), site, "W")
    lines = (site / "labels.csv").read_text().splitlines()
    (site / "labels.csv").write_text("\n".join(lines[:9]) + "\n")
    assert np.array_equal(acceptance.read_cases(site, size=128).labels, cases.labels, equal_nan=True)
    path = site / "state" / acceptance.CASES
    path.write_text(path.read_text().replace("1", "0", 1))
    with pytest.raises(DataError) as caught:
        acceptance.read_cases(site, size=128)
    assert caught.value.code == "cases-changed"


def test_constancy_is_shown_and_a_change_is_found(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_to_use(examine(str(GOOD), site, "W"), site, "W")
    found = check_constancy(site, "W")
    assert found.is_constant
    assert found.largest_change < 1e-3
    true_score = acceptance.score
    monkeypatch.setattr(acceptance, "score", lambda *how: true_score(*how) + 0.5)
    changed = check_constancy(site, "W")
    assert not changed.is_constant
    assert changed.largest_change == pytest.approx(0.5, abs=1e-3)
    last = model_in_use.entries(site / "state")[-1]
    assert (last["action"], last["figures"]["constant"]) == ("check", False)
    assert check_is_due(site / "state") == ""
    monkeypatch.setattr(acceptance, "MONTH_DAYS", 0)
    assert check_is_due(site / "state") == last["at"][:10]


def test_a_changed_file_of_the_model_in_use_is_not_applied(site: Path) -> None:
    put_to_use(examine(str(GOOD), site, "W"), site, "W")
    state = site / "state"
    (kept,) = (state / model_in_use.FOLDER).iterdir()
    kept.write_bytes(kept.read_bytes()[:-1] + b"\0")
    with pytest.raises(DataError) as caught:
        find_model(None, state)
    assert caught.value.code == "models-damaged"
    log = state / model_in_use.LOG.name
    log.write_text(log.read_text().replace('"by": "W"', '"by": "X"'))
    with pytest.raises(DataError):
        model_in_use.entries(state)


def answers(calls: list[int], truth: list[float]) -> Answers:
    """Motion of some patients; nothing else was assessed."""
    shape = (len(calls), len(NAMES))
    known, called = np.full(shape, np.nan), np.zeros(shape, bool)
    known[:, NAMES.index("motion")], called[:, NAMES.index("motion")] = truth, calls
    return Answers(scores=known, calls=called, truth=known)


@pytest.mark.parametrize(
    ("calls", "reasons"),
    [
        ([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], 0),  # as the one in use
        ([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], 0),  # finds one more
        ([1, 1, 0, 0, 0, 0, 0, 0, 0, 0], 1),  # finds one less
        ([1, 1, 1, 0, 1, 0, 0, 0, 0, 0], 2),  # one alarm more: of all, and of motion, less than a fifth
        ([0] * 10, 2),
    ],
)
def test_worse_means_less_found_or_more_alarms(calls: list[int], reasons: int) -> None:
    truth = [1.0] * 4 + [0.0] * 6
    found = compare(answers(calls, truth), answers([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], truth))
    expected = {0: 0, 1: 1, 2: None}[reasons]
    assert bool(found.reasons) is bool(reasons), found.reasons
    if expected is not None:
        assert len(found.reasons) == expected


def differing(better: int, worse: int, artifacts: int = 1) -> Comparison:
    """Patients of whom one model alone is right, about so many artifacts each."""
    truth = np.full((better + worse, len(NAMES)), np.nan)
    truth[:, :artifacts] = 1
    calls = np.repeat([True, False], [better, worse])[:, None] & (truth == 1)
    new, old = (Answers(scores=truth, calls=one, truth=truth) for one in (calls, ~calls & (truth == 1)))
    return compare(new, old)


def test_two_models_are_compared_by_mcnemars_exact_test() -> None:
    """121 against 59 differing pairs: the p of statsmodels 0.15 (mcnemar, exact); and by hand."""
    assert (differing(121, 59).better_cases, differing(121, 59).worse_cases) == (121, 59)
    assert differing(121, 59).p == pytest.approx(4.434449e-06, rel=1e-6)
    for better, worse in ((6, 0), (1, 9), (5, 5)):
        pairs = better + worse
        tail = sum(math.comb(pairs, number) for number in range(min(better, worse) + 1)) / 2**pairs
        assert differing(better, worse).p == pytest.approx(min(1.0, 2 * tail))
    assert replace(differing(1, 1), better_cases=0, worse_cases=0).p == 1


def test_artifacts_of_one_patient_are_no_independent_pairs() -> None:
    one, three = differing(6, 2), differing(6, 2, artifacts=3)
    assert (one.only_candidate_right, three.only_candidate_right) == (6, 18)
    assert one.p == three.p
    assert three.public()["p"] == pytest.approx(three.p, abs=1e-6)
    assert three.p > 0.05


def test_the_command_asks_who_answers(site: Path, poor: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--site", site)
    assert typed(capsys, "site", "use", GOOD, *where, "--yes")[0] == 2, "no name"
    status, said, err = typed(capsys, "site", "use", GOOD, *where, "--yes", "--approver", "Dr. Weber")
    assert (status, "frozen cases" in said, "in use since" in err) == (0, True, True)
    status, said, err = typed(capsys, "site", "use", poor, *where, "--yes", "--approver", "Dr. Weber")
    assert (status, "[worse-model]" in err) == (4, True)
    status, _, err = typed(capsys, "site", "use", GOOD, poor, *where, "--yes", "--approver", "Dr. Weber")
    assert (status, "a site uses one model, not 2" in err) == (2, True)
    assert typed(capsys, "site", "use", "--check", *where, "--yes", "--approver", "Dr. Berg")[0] == 0
    assert typed(capsys, "site", "use", "--rollback", *where, "--yes", "--approver", "Dr. Berg")[0] == 0
    status, said, _ = typed(capsys, "site", "use", "--log", *where, "--format", "json")
    assert [one["action"] for one in json.loads(said)] == ["use", "refuse", "check", "rollback"]
    text = typed(capsys, "site", "use", "--log", *where)[1]
    assert "by Dr. Berg" in text
    assert max(map(len, text.splitlines())) <= 80
