"""The model card says what evaluation.json says of gap and thresholds, and what was not measured."""

from __future__ import annotations

from common.artifacts import NAMES
from common.counts import Counts
from server.evaluation.model_card import model_card
from server.evaluation.operating import point_of
from server.evaluation_file import checked
from tests.helpers.report_page import HELD_OUT, evaluation_of

MODEL = {"name": "small_cnn", "initial": "package:small_cnn_phantoms"}


def test_the_card_has_gap_and_thresholds() -> None:
    values = checked(evaluation_of(held_out=(*HELD_OUT, "elm", "fir")), "evaluation.json")
    card = model_card(values, "federated", MODEL)
    gap = values["generalization_gap"]["federated"]
    assert f"- Unseen less home: {gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" in card
    assert f"at the next one expect {gap['next_low']:.3f} to {gap['next_high']:.3f} (95 %)" in card
    public = Counts.from_json(values["public_counts"]["federated"])
    point = point_of(public, NAMES.index("motion"), None)
    assert point is not None
    line = f"  - `motion`: logit {point.threshold:.2f}; sensitivity {point.sensitivity:.3f} of "
    assert f"{line}{point.positives}," in card
    assert 0.8 <= point.sensitivity < 1
    assert "Not measured: calibration" not in card


def test_one_held_out_hospital_promises_nothing_of_the_next() -> None:
    card = model_card(checked(evaluation_of(), "evaluation.json"), "federated", MODEL)
    assert "of 1 held-out hospitals; too few for what to expect at the next." in card


def test_an_earlier_file_has_neither() -> None:
    values = evaluation_of(public=False)
    del values["generalization_gap"]
    card = model_card(checked(values, "evaluation.json"), "federated", MODEL)
    assert "Unseen less home" not in card
    assert "- Thresholds: none was chosen." in card
