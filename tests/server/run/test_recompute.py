"""A run is recomputed from what its sites signed; each change of the run folder is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import ConfigError
from common.model_file import load_model, save_model
from common.models import build
from common.signing import Statement, load_key, payload_sha256, sign
from common.verify import verify_command
from common.weights import manifest_of
from common.wire import Envelope, SiteUpdate
from server.messaging.signatures import Seal
from server.run.conduct import conduct
from server.run.recompute import Finding, recompute
from server.run_folder import RunFolder
from tests.helpers.consortium import HELD_OUT, SITES, TRAINING, Consortium, tiny_plan
from tests.helpers.site_agent import COORDINATOR, enrol

A, B, _ = TRAINING
MANIFEST = manifest_of(build("small_cnn").state_dict())


@pytest.fixture(scope="module")
def finished(tiny_consortium: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A signed run of three arms."""
    root = tmp_path_factory.mktemp("recompute")
    consortium = Consortium(data=Path(shutil.copytree(tiny_consortium, root / "data")))
    for name in SITES:
        enrol(consortium.data / name)
    plan = tiny_plan(arms=["public", "local", "federated", "federated_dp"])
    keys = {name: load_key(consortium.data / name / "state" / "signing.key") for name in SITES}
    seal = Seal(
        plan_sha256=plan.sha256(),
        key=COORDINATOR,
        sites={name: key.public_key() for name, key in keys.items()},
    )
    return conduct(consortium.grid(plan, root / "run"), plan, root / "run", seal=seal)


@pytest.fixture
def keys(finished: RunFolder) -> dict[str, Ed25519PrivateKey]:
    data = finished.path.parent / "data"
    return {name: load_key(data / name / "state" / "signing.key") for name in SITES}


@pytest.fixture
def folder(finished: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished.path, tmp_path / "run")
    return RunFolder.open(tmp_path / "run")


def failed(folder: RunFolder) -> dict[str, str]:
    return {found.check: found.detail for found in recompute(folder) if found.holds is False}


def rewritten(folder: RunFolder, arm: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply `change` to the first record of an arm's rounds."""
    path = folder.path / "arms" / arm / "rounds.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    change(records[0])
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def answer_of(folder: RunFolder, arm: str, round_number: int, site: str) -> Path:
    return folder.path / "arms" / arm / "answers" / f"round-{round_number:04d}" / f"{site}.answer"


def signed_again(key: Ed25519PrivateKey, payload: bytes, statement: str) -> bytes:
    said = Statement.parse(statement).model_copy(update={"payload_sha256": payload_sha256(payload)}).text()
    return Envelope(payload=payload, statement=said, signature=sign(said, key)).to_bytes()


def test_an_honest_run_is_recomputed_bit_for_bit(finished: RunFolder) -> None:
    found = {finding.check: finding for finding in recompute(finished)}
    assert all(finding.holds for finding in found.values()), found
    assert {f"local/{A}", "federated", "federated_dp", "federated, model", "evaluation"} <= set(found)
    assert "2 rounds recomputed" in found["federated_dp"].detail


def test_a_simulation_is_recomputed_and_says_that_nothing_is_signed(
    consortium: Consortium, tmp_path: Path
) -> None:
    run = consortium.conduct(tiny_plan(arms=["public", "federated"]), tmp_path / "run")
    found = recompute(run)
    assert [finding.check for finding in found if finding.holds is None] == ["signatures"]
    assert not [finding for finding in found if finding.holds is False]


def test_a_file_of_a_version_without_the_gap_is_recomputed(folder: RunFolder) -> None:
    path = folder.path / "evaluation.json"
    values = json.loads(path.read_text())
    del values["generalization_gap"]
    path.write_text(json.dumps(values))
    assert "evaluation" not in failed(folder)
    path.write_text(json.dumps(values | {"generalization_gap": {"federated": None}}))
    with pytest.raises(ConfigError):
        _ = folder.evaluation


def test_any_artifact_is_recomputed_and_a_file_without_it_is_of_an_earlier_version(folder: RunFolder) -> None:
    path = folder.path / "evaluation.json"
    kept = json.loads(path.read_text())
    assert set(kept["any_artifact"]["counts"]) == set(SITES)
    assert set(kept["any_public"]) == set(kept["matrix"])
    changed = json.loads(path.read_text())
    changed["any_artifact"]["matrix"]["federated"][HELD_OUT]["auroc"] = 0.999
    path.write_text(json.dumps(changed))
    assert "any_artifact" in failed(folder)["evaluation"]
    del kept["any_artifact"], kept["any_public"]
    path.write_text(json.dumps(kept))
    assert "evaluation" not in failed(folder)


def test_the_command_prints_a_line_a_check_and_fails_where_one_does(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify_command(folder.path) == 0
    assert "ok    federated_dp" in capsys.readouterr().out
    answer_of(folder, "federated", 1, A).write_bytes(b"")
    assert verify_command(folder.path) == 1
    assert "FAIL  federated " in capsys.readouterr().out


@pytest.mark.parametrize("arm", ["federated", "federated_dp"])
def test_an_answer_of_which_a_bit_was_changed_is_found(folder: RunFolder, arm: str) -> None:
    path = answer_of(folder, arm, 2, A)
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert set(failed(folder)) == {arm}


def test_another_update_is_found_though_the_record_was_changed_to_fit(folder: RunFolder) -> None:
    """The coordinator replaces an update: it has no key of the site."""
    path = answer_of(folder, "federated_dp", 1, A)
    envelope = Envelope.from_bytes(path.read_bytes())
    update = SiteUpdate.from_bytes(envelope.payload).model_copy(update={"epsilon": 0.01})
    path.write_bytes(
        Envelope(
            payload=update.to_bytes(), statement=envelope.statement, signature=envelope.signature
        ).to_bytes()
    )
    rewritten(folder, "federated_dp", lambda record: record["claims"][A].update(epsilon=0.01))
    assert "signed another answer" in failed(folder)["federated_dp"]


def test_an_answer_to_another_round_is_found(folder: RunFolder) -> None:
    shutil.copy(answer_of(folder, "federated", 1, A), answer_of(folder, "federated", 2, A))
    assert "federated" in failed(folder)


def test_an_answer_in_the_name_of_another_site_is_found(folder: RunFolder) -> None:
    shutil.copy(answer_of(folder, "federated", 1, A), answer_of(folder, "federated", 1, B))
    assert "federated" in failed(folder)


def test_an_update_of_a_held_out_site_is_found_though_the_site_signed_it(
    folder: RunFolder, keys: dict[str, Ed25519PrivateKey]
) -> None:
    envelope = Envelope.from_bytes(answer_of(folder, "federated", 1, A).read_bytes())
    payload = SiteUpdate.from_bytes(envelope.payload).model_copy(update={"site": HELD_OUT}).to_bytes()
    said = Statement.parse(envelope.statement).model_copy(update={"site": HELD_OUT}).text()
    path = answer_of(folder, "federated", 1, HELD_OUT)
    path.write_bytes(signed_again(keys[HELD_OUT], payload, said))
    rewritten(folder, "federated", lambda record: record["weights"].update({HELD_OUT: record["weights"][A]}))
    assert failed(folder)["federated"] == f"round 1: {HELD_OUT} was held out, and trained"


def test_a_weight_that_is_not_the_sites_is_found(
    folder: RunFolder, keys: dict[str, Ed25519PrivateKey]
) -> None:
    path = answer_of(folder, "federated", 1, A)
    envelope = Envelope.from_bytes(path.read_bytes())
    heavier = SiteUpdate.from_bytes(envelope.payload).model_copy(update={"weight": 5000})
    path.write_bytes(signed_again(keys[A], heavier.to_bytes(), envelope.statement))
    assert "weight" in failed(folder)["federated"]


def test_a_variance_that_no_codec_added_is_found_in_the_answer_and_in_the_record(
    folder: RunFolder, keys: dict[str, Ed25519PrivateKey]
) -> None:
    rewritten(folder, "local/hospital-a", lambda record: record["added_variance"].update({A: 0.25}))
    path = answer_of(folder, "federated_dp", 1, A)
    envelope = Envelope.from_bytes(path.read_bytes())
    payload = SiteUpdate.from_bytes(envelope.payload).model_copy(update={"added_variance": 0.25}).to_bytes()
    path.write_bytes(signed_again(keys[A], payload, envelope.statement))
    found = failed(folder)
    assert "added_variance is 0.25, expected 0.0" in found["federated_dp"]
    assert "added variance of hospital-a is not what rounds.jsonl says" in found["local/hospital-a"]


def test_a_site_that_was_left_out_of_the_mean_is_found(folder: RunFolder) -> None:
    rewritten(folder, "federated", lambda record: record["weights"].pop(A))
    assert "the model that the answers give" in failed(folder)["federated"]


def test_a_guarantee_that_the_site_did_not_give_is_found(folder: RunFolder) -> None:
    rewritten(folder, "federated_dp", lambda record: record["claims"][A].update(epsilon=0.5))
    assert "guarantee" in failed(folder)["federated_dp"]


def test_another_checkpoint_and_another_model_are_found(folder: RunFolder) -> None:
    arm = folder.arm("federated")
    model = load_model(arm.checkpoint_path(1), MANIFEST)
    arm.save_checkpoint(1, model + np.float32(1e-6), MANIFEST)
    save_model(folder.arm("federated_dp").model_path, model, MANIFEST, {})
    found = failed(folder)
    assert "checkpoint" in found["federated"]
    assert "federated_dp, model" in found


def test_another_plan_is_found(folder: RunFolder) -> None:
    path = folder.path / "plan.yaml"
    path.write_text(path.read_text().replace("learning_rate: 3.0", "learning_rate: 0.5"))
    assert "plan" in failed(RunFolder.open(folder.path))


@pytest.mark.parametrize("part", ["counts", "headline", "matrix", "scores"])
def test_a_number_of_the_evaluation_that_does_not_follow_from_the_scores_is_found(
    folder: RunFolder, part: str
) -> None:
    path = folder.path / "evaluation.json"
    noted = json.loads(path.read_text())
    inner = noted[part]
    while isinstance(inner, dict) and isinstance(next(iter(inner.values())), dict | list):
        inner = next(iter(inner.values()))
    if isinstance(inner, list):
        inner[0] = [9] * len(inner[0]) if isinstance(inner[0], list) else 9
    else:
        inner[next(iter(inner))] = 0.123
    path.write_text(json.dumps(noted))
    assert failed(folder) == {"evaluation": f"not what the sites' scores give: {part}"}


def test_scores_that_were_changed_or_exchanged_are_found(folder: RunFolder) -> None:
    path = folder.path / "answers" / "evaluation" / f"{A}.answer"
    before = path.read_bytes()
    path.write_bytes(before[:-9] + bytes([before[-9] ^ 1]) + before[-8:])
    assert set(failed(folder)) == {"evaluation"}
    shutil.copy(path.with_name(f"{B}.answer"), path)
    assert set(failed(folder)) == {"evaluation"}
    path.unlink()
    assert {found.check: found.holds for found in recompute(folder)}["evaluation"] is None


def test_a_run_without_answers_is_not_called_wrong_nor_right(folder: RunFolder) -> None:
    for path in folder.path.glob("arms/**/answers"):
        shutil.rmtree(path)
    states = {found.check: found.holds for found in recompute(folder)}
    assert states["federated"] is None
    assert states["plan"] is True


def test_answers_of_an_attempt_that_was_cut_off_are_dropped(folder: RunFolder) -> None:
    arm = folder.arm("federated")
    arm.keep_answer(3, A, b"half")
    arm.forget_rounds_after(2)
    assert arm.kept_answers(3) == {}
    assert set(arm.kept_answers(2)) == set(TRAINING)


def test_a_finding_is_no_exception(folder: RunFolder) -> None:
    """Whatever lies in the answers: 25 random changes, each a finding or no change at all."""
    generator = np.random.default_rng(5)
    paths = sorted(folder.path.glob("arms/federated_dp/answers/*/*.answer"))
    for _ in range(25):
        path = paths[generator.integers(len(paths))]
        before = path.read_bytes()
        content = bytearray(before)
        for _ in range(3):
            content[generator.integers(len(content))] = generator.integers(256)
        path.write_bytes(content[: generator.integers(1, len(content) + 1)])
        findings: list[Finding] = recompute(folder)
        is_same = path.read_bytes() == before
        assert any(found.holds is False for found in findings) != is_same
        path.write_bytes(before)
