"""A rehearsal names every site that was enrolled or answered, and says whether the run may start."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import PlanError, RefusedError
from common.excursion import update_deviation
from common.plan import Evaluate, ReleasedModel, RunPlan
from common.pricing import with_noise
from common.wire import Refusal, SiteReadiness
from server.run.rehearsal import admit, check_table, rehearsed
from tests.helpers.consortium import tiny_plan

PLAN = tiny_plan(arms=["public", "federated", "federated_dp"], held_out=["d"], federation={"quorum": 2})
ENROLLED = ["a", "b", "c", "d"]


def ready(site: str, **changes: Any) -> SiteReadiness:
    values: dict[str, Any] = {
        "site": site,
        "kind": "hospital",
        "nominal_patients": 200,
        "version": "0.1.0",
        "arms": {"federated": "accept", "federated_dp": "accept"},
        "reasons": {},
        "evaluation": "accept",
        "data_prepared": True,
        "rounds_affordable": 2,
        "seconds_a_round": 1.5,
    }
    return SiteReadiness(**values | changes)


def no(site: str, code: str = "not-approved") -> Refusal:
    return Refusal(site=site, code=code, reason="not yet")


ALL = {name: ready(name) for name in ENROLLED}
HALF = {"federated": "non-private-not-permitted", "federated_dp": "accept"}
NONE = {"federated": "non-private-not-permitted", "federated_dp": "epsilon-over-policy"}


def answers(check: dict[str, Any]) -> dict[str, str]:
    return {name: site["answer"] for name, site in check["sites"].items()}


def test_when_all_accept_nobody_is_missing_and_the_run_may_start() -> None:
    check = rehearsed(PLAN, ALL, ENROLLED)
    assert answers(check) == dict.fromkeys(ENROLLED, "accept")
    assert (check["missing"], check["training"], check["enough"]) == ([], ["a", "b", "c"], True)
    assert check["plan_sha256"] == PLAN.sha256()
    admit(PLAN, check, accept_missing=False)


@pytest.mark.parametrize(
    ("said", "answer", "takes_part"),
    [
        (None, "no answer", False),
        (no("b"), "not-approved", False),
        (no("b", "site-failure"), "site-failure", False),
        (ready("b", arms=HALF), "accept 1 of 2 arms", True),
        (ready("b", arms=NONE), "non-private-not-permitted", False),
        (ready("b", evaluation="evaluation-not-permitted"), "accept", True),
    ],
    ids=["silent", "refuses", "fails", "half", "no-arm", "no-evaluation"],
)
def test_a_site_takes_part_if_it_would_train_any_arm(said: Any, answer: str, takes_part: bool) -> None:
    found = {name: site for name, site in (ALL | {"b": said}).items() if site is not None}
    check = rehearsed(PLAN, found, ENROLLED)
    assert answers(check)["b"] == answer
    assert (check["sites"]["b"]["takes_part"], check["missing"]) == (takes_part, [] if takes_part else ["b"])
    assert check["enough"]


def test_a_held_out_site_takes_part_if_it_may_be_scored() -> None:
    """What it says of training is nobody's question."""
    check = rehearsed(PLAN, ALL | {"d": ready("d", arms=NONE, reasons={"federated": "x"})}, ENROLLED)
    assert answers(check)["d"] == "accept"
    assert check["sites"]["d"]["reasons"] == {}
    check = rehearsed(PLAN, ALL | {"d": ready("d", evaluation="evaluation-not-permitted")}, ENROLLED)
    assert answers(check)["d"] == "evaluation-not-permitted"
    assert not check["enough"]
    with pytest.raises(PlanError):
        admit(PLAN, check, accept_missing=True)


def test_a_plan_that_trains_nothing_at_the_sites_needs_no_arm_accepted() -> None:
    plan = tiny_plan(arms=["public"], held_out=["d"])
    check = rehearsed(plan, {name: ready(name, arms={}) for name in ENROLLED}, ENROLLED)
    assert (check["missing"], check["enough"]) == ([], True)


def test_who_answered_without_being_known_is_shown_and_counts_for_nobody() -> None:
    found = {name: site for name, site in ALL.items() if name != "b"} | {
        "node-7": Refusal(code="agent-unreachable", reason="x")
    }
    check = rehearsed(PLAN, found, ENROLLED)
    assert answers(check) == {
        "a": "accept",
        "b": "no answer",
        "c": "accept",
        "d": "accept",
        "node-7": "agent-unreachable",
    }
    assert (check["missing"], check["training"]) == (["b", "node-7"], ["a", "c"])
    long = {"node-5767934415006210898": found["node-7"]}  # Flower's numbers have 19 digits
    lines = check_table(rehearsed(PLAN, found | long, ENROLLED)).splitlines()
    assert lines[lines.index("node-5767934415006210898") + 1].split()[0] == "agent-unreachable"


def test_a_plan_whose_noise_leaves_the_range_of_an_update_is_refused_before_it_is_charged() -> None:
    """At one nominal patient this plan's noise has 16 weight units in a round, and an update ends at 64."""
    found = ALL | {"c": ready("c", nominal_patients=1)}
    private = tiny_plan(arms=["federated_dp"], held_out=["d"], privacy={"epsilon": 1.0, "learning_rate": 3.0})
    check = rehearsed(private, found, ENROLLED)
    assert list(check["beyond_reach"]) == ["c"]
    assert check["beyond_reach"]["c"] == pytest.approx(8 * update_deviation(private, 1), rel=1e-2)
    assert not check["enough"]
    with pytest.raises(PlanError, match=r"beyond 64.*c 1\d\d") as caught:
        admit(private, check, accept_missing=True)
    assert caught.value.code == "noise-too-large"
    text = check_table(check)
    assert "NOT to be started" in text
    assert "privacy.learning_rate" in text
    gentle = private.model_copy(update={"privacy": private.privacy.model_copy(update={"learning_rate": 0.5})})
    assert rehearsed(gentle, found, ENROLLED)["enough"]
    without = {name: ready(name, nominal_patients=1, arms={"federated": "accept"}) for name in ENROLLED}
    plan = tiny_plan(arms=["federated"], held_out=["d"], privacy={"epsilon": 1.0})
    assert rehearsed(plan, without, ENROLLED)["beyond_reach"] == {}


def test_a_site_that_does_not_train_has_no_noise_to_judge() -> None:
    private = tiny_plan(arms=["federated_dp"], held_out=["d"], privacy={"epsilon": 1.0})
    private = private.model_copy(update={"arms": ("federated", "federated_dp")})
    refusing = {"federated": "accept", "federated_dp": "too-few-patients"}
    found = ALL | {
        "c": ready("c", nominal_patients=1, arms=refusing),
        "d": ready("d", nominal_patients=1),
    }
    assert rehearsed(private, found, ENROLLED)["beyond_reach"] == {}


def test_missing_sites_need_somebody_to_accept_that() -> None:
    check = rehearsed(PLAN, {name: site for name, site in ALL.items() if name != "b"}, ENROLLED)
    with pytest.raises(RefusedError, match="b: no answer") as caught:
        admit(PLAN, check, accept_missing=False)
    assert (caught.value.code, caught.value.exit_status) == ("sites-missing", 4)
    assert "--accept-missing" in caught.value.hint
    admit(PLAN, check, accept_missing=True)


@pytest.mark.parametrize("accept_missing", [False, True])
def test_fewer_sites_than_the_quorum_do_not_start_whatever_was_accepted(accept_missing: bool) -> None:
    for found in ({"a": ready("a"), "d": ready("d")}, {name: ready(name) for name in "abc"}):
        with pytest.raises(PlanError) as caught:
            admit(PLAN, rehearsed(PLAN, found, ENROLLED), accept_missing=accept_missing)
        assert caught.value.code == "too-few-sites"


@given(st.dictionaries(st.sampled_from(ENROLLED), st.sampled_from(["accept", "half", "none", "refuse"])))
def test_a_run_starts_if_and_only_if_enough_would_train_and_every_held_out_site_can_be_scored(
    said: dict[str, str],
) -> None:
    kinds = {
        "accept": ready,
        "half": lambda name: ready(name, arms=HALF),
        "none": lambda name: ready(name, arms=NONE),
        "refuse": no,
    }
    check = rehearsed(PLAN, {name: kinds[kind](name) for name, kind in said.items()}, ENROLLED)  # type: ignore[operator]
    training = [name for name in "abc" if said.get(name) in ("accept", "half")]
    scored = said.get("d") in ("accept", "half", "none")
    assert check["training"] == training
    assert check["enough"] == (len(training) >= 2 and scored)
    assert set(check["missing"]) == set(ENROLLED) - set(training) - ({"d"} if scored else set())
    starts = check["enough"] and not check["missing"]
    try:
        admit(PLAN, check, accept_missing=False)
    except (PlanError, RefusedError):
        assert not starts
    else:
        assert starts


NO_SCORE = "evaluation-not-permitted"


def unscored(*names: str, **changes: Any) -> dict[str, SiteReadiness]:
    """Everybody accepts; of these sites nobody may score the models."""
    why = {"evaluation": "only with noise"}
    return ALL | {name: ready(name, evaluation=NO_SCORE, reasons=why, **changes) for name in names}


PRIVATE = tiny_plan(arms=["federated_dp"], held_out=[], federation={"quorum": 2})


def test_a_private_run_that_scores_no_hospital_does_not_start_unless_that_is_accepted() -> None:
    """Epsilon is spent at the start, and the score comes at the end."""
    found = unscored("a", "b", "c") | {"d": ready("d", kind="public")}
    check = rehearsed(PRIVATE, found, ENROLLED)
    assert (check["enough"], check["missing"]) == (True, [])
    assert check["unscored"] == dict.fromkeys("abc", NO_SCORE)
    with pytest.raises(RefusedError, match=f"a: {NO_SCORE}") as caught:
        admit(PRIVATE, check, accept_missing=False)
    assert (caught.value.code, caught.value.exit_status) == ("no-hospital-scored", 4)
    admit(PRIVATE, check, accept_missing=True)
    table = check_table(check)
    assert table.count("  evaluation: only with noise") == 3
    assert "no hospital could be scored" in table
    assert table.endswith("enough sites to start")


@pytest.mark.parametrize("accept_missing", [False, True])
@pytest.mark.parametrize(
    ("plan", "kind"),
    [
        (PRIVATE, "hospital"),
        (PRIVATE, "public"),
        (tiny_plan(arms=["federated"], held_out=[], federation={"quorum": 2}), "hospital"),
    ],
    ids=["private", "private-public", "not-private"],
)
def test_a_run_that_nobody_could_score_does_not_start_whatever_was_accepted(
    plan: Any, kind: str, accept_missing: bool
) -> None:
    """It would train and be charged, and end as `no-evaluation`."""
    check = rehearsed(plan, unscored(*ENROLLED, kind=kind) | {"d": no("d")}, ENROLLED)
    assert (check["enough"], check["scored"]) == (True, [])
    with pytest.raises(RefusedError, match=f"a: {NO_SCORE}.*d: not-approved") as caught:
        admit(plan, check, accept_missing=accept_missing)
    assert (caught.value.code, caught.value.exit_status) == ("no-evaluation", 4)
    table = check_table(check)
    assert "NOT to be started: no site could be scored" in table
    assert "enough sites to start" not in table


def test_a_site_that_trains_nothing_is_scored_all_the_same() -> None:
    """The run asks every site that is there for a score, also one that refused every arm."""
    found = unscored("a", "b", "c") | {"d": ready("d", arms={"federated_dp": "too-few-patients"})}
    check = rehearsed(PRIVATE, found, ENROLLED)
    assert check["scored"] == ["d"]
    admit(PRIVATE, check, accept_missing=True)


@pytest.mark.parametrize(
    ("plan", "found"),
    [
        (PRIVATE, ALL),
        (PRIVATE, unscored("a", "b", "c")),
        (tiny_plan(arms=["federated"], held_out=[]), unscored("a", "b", "c")),
    ],
    ids=["all-scored", "one-scored", "not-private"],
)
def test_a_run_starts_where_a_hospital_is_scored_or_nothing_is_charged(plan: Any, found: Any) -> None:
    check = rehearsed(plan, found, ENROLLED)
    assert check["unscored"] == {}
    admit(plan, check, accept_missing=False)


def test_a_public_site_that_is_scored_does_not_make_up_for_the_hospitals() -> None:
    found = unscored("a", "b", "c") | {"d": ready("d", kind="public")}
    assert set(rehearsed(PRIVATE, found, ENROLLED)["unscored"]) == {"a", "b", "c"}
    public = {name: ready(name, kind="public") for name in ENROLLED}
    assert rehearsed(PRIVATE, public, ENROLLED)["unscored"] == {}


def test_a_hospital_that_does_not_take_part_is_not_asked_for_a_score() -> None:
    found = unscored("b", "c") | {"a": no("a"), "d": ready("d")}
    assert rehearsed(PRIVATE, found, ENROLLED)["unscored"] == {}
    assert set(rehearsed(PRIVATE, found | {"d": no("d")}, ENROLLED)["unscored"]) == {"b", "c"}


def test_the_table_says_it_all_in_lines_that_fit_a_terminal() -> None:
    found = ALL | {
        "b": ready("b", arms=HALF, reasons={"federated": "the policy says so"}, data_prepared=False),
        "c": no("c"),
    }
    text = check_table(rehearsed(PLAN, found, ENROLLED))
    lines = text.splitlines()
    assert "accept 1 of 2 arms" in text
    assert "  federated: the policy says so" in lines
    assert "  all: not yet" in lines
    assert "would not take part: c" in lines
    assert lines[-1] == "enough sites to start"
    assert "not yet" in next(line for line in lines if line.startswith("b "))
    assert "2/2" in next(line for line in lines if line.startswith("a "))
    assert max(map(len, lines)) <= 100
    assert check_table(rehearsed(PLAN, {}, ENROLLED)).endswith("NOT enough sites: the quorum is 2")


def test_who_is_scored_with_noise_is_told_what_that_costs_and_whether_it_tells_anything() -> None:
    """From the bucket, before a patient is charged; decided by the number of models, too."""
    released = [ReleasedModel(name=name, sha256="0" * 64) for name in ("public", "federated_dp")]

    def plan(models: int) -> RunPlan:
        evaluate = Evaluate(run="r", models=tuple(released[:models]))
        values = {"arms": (), "held_out": (), "evaluate": evaluate}
        return with_noise(tiny_plan(privacy={"epsilon": 2.0}).model_copy(update=values))

    said = {
        "a": ready("a", arms={}, kind="hospital", scoring="dp", nominal_tested=2000),
        "b": ready("b", arms={}, kind="hospital", scoring="dp", nominal_tested=20),
        "c": ready("c", arms={}, kind="hospital", scoring="disclosed", nominal_tested=20),
    }
    check = rehearsed(plan(1), said, list(said))
    expected = {name: site["expected"] for name, site in check["sites"].items()}
    assert (expected["a"]["estimable"], expected["b"]["estimable"], expected["c"]) == (True, False, None)
    assert 1.99 < expected["a"]["epsilon"] <= 2.0
    assert rehearsed(plan(2), said, list(said))["sites"]["a"]["expected"]["error"] > expected["a"]["error"]
    text = check_table(check)
    assert (
        "evaluation: accept, with noise, charged epsilon 2.00; estimable at this n and epsilon (2000" in text
    )
    assert (
        "not estimable at this n and epsilon (20 test patients by the bucket, epsilon 2.00, 1 model)" in text
    )
    assert "evaluation: accept, exact and outside the guarantee, not charged" in text
    assert (check["training"], check["enough"]) == ([], True)  # a quorum is of those that train
    admit(plan(1), check, accept_missing=False)
    with pytest.raises(RefusedError, match="no site could be scored \\(") as refused:
        admit(plan(1), rehearsed(plan(1), {"a": no("a")}, ["a"]), accept_missing=True)
    assert refused.value.code == "no-evaluation"
