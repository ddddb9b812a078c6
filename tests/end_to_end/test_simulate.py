"""`fedqc simulate` through the console script: what it prints, what it writes, and that the one follows from
the other.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from common.artifacts import DEFAULT_LABELS
from common.counts import Counts
from common.plan import read_plan
from common.pricing import with_noise
from tests.helpers.command_line import fedqc, simulate_words
from tests.helpers.consortium import HELD_OUT, SITES, TRAINING, Finished, write_plan

ARMS = ("public", "local", "federated", "federated_dp", "pooled")
SHARED = ("public", "federated", "federated_dp", "pooled")
ARM_FOLDERS = (*(f"local/{site}" for site in TRAINING), "federated", "federated_dp", "pooled")


@pytest.fixture(scope="module")
def told(finished: Finished) -> dict[str, Any]:
    assert finished.said.returncode == 0, finished.said.stderr
    return json.loads(finished.said.stdout)


@pytest.fixture(scope="module")
def written(finished: Finished, told: dict[str, Any]) -> dict[str, Any]:
    return json.loads((finished.out / "evaluation.json").read_text(encoding="utf-8"))


def test_stdout_is_one_json_object_and_talk_is_on_stderr(finished: Finished, told: dict[str, Any]) -> None:
    assert finished.said.stdout == json.dumps(told, ensure_ascii=False) + "\n"
    assert "NaN" not in finished.said.stdout
    lines = finished.said.stderr.splitlines()
    assert sum(line.startswith("[") for line in lines) >= len(ARM_FOLDERS) * 2
    assert not [line for line in lines if "Warning" in line or "Traceback" in line]


def test_the_keys_are_those_promised(told: dict[str, Any]) -> None:
    assert set(told) == {
        "schema",
        "run",
        "status",
        "rounds",
        "sites",
        "metrics",
        "matrix",
        "headline",
        "privacy",
        "scoring",
        "cpu_seconds",
    }
    assert (told["status"], told["rounds"]) == ("completed", 2)
    assert told["cpu_seconds"] > 0


def test_the_run_is_where_it_says(finished: Finished, told: dict[str, Any]) -> None:
    assert Path(told["run"]) == finished.out


def test_metrics_are_arm_site_artifact(told: dict[str, Any]) -> None:
    assert tuple(told["metrics"]) == ARMS
    for arm, by_site in told["metrics"].items():
        assert tuple(by_site) == (TRAINING if arm == "local" else SITES)
        for by_artifact in by_site.values():
            assert tuple(by_artifact) == DEFAULT_LABELS
            for found in by_artifact.values():
                assert set(found) == {"auroc", "low", "high", "n_pos", "n_neg"}
                if found["auroc"] is None:
                    assert min(found["n_pos"], found["n_neg"]) == 0
                else:
                    assert 0 <= found["low"] <= found["auroc"] <= found["high"] <= 1


def test_the_matrix_has_every_model_at_every_site(told: dict[str, Any]) -> None:
    assert set(told["matrix"]) == {*SHARED, *(f"local/{site}" for site in TRAINING)}
    assert all(tuple(by_site) == SITES for by_site in told["matrix"].values())
    for site in TRAINING:
        assert told["metrics"]["local"][site] == told["matrix"][f"local/{site}"][site]


def test_the_headline_has_four_numbers_an_arm(told: dict[str, Any]) -> None:
    assert tuple(told["headline"]) == ARMS
    for arm, found in told["headline"].items():
        assert set(found) == {"home", "elsewhere", "unseen", "worst"}
        assert all(value is None or 0 <= value <= 1 for value in found.values())
        assert arm in ("public", "local") or found["elsewhere"] is None, "it trained at all of them"


def test_privacy_is_told_for_every_training_site(told: dict[str, Any]) -> None:
    assert tuple(told["privacy"]) == TRAINING
    for claim in told["privacy"].values():
        assert {"epsilon", "delta", "unit", "adjacency", "refused"} <= set(claim)
        assert 1.99 < claim["epsilon"] <= 2
        assert (claim["delta"], claim["unit"], claim["adjacency"], claim["refused"]) == (
            1e-5,
            "patient",
            "add/remove",
            None,
        )


def test_sites_have_a_role(told: dict[str, Any]) -> None:
    assert [(site["site"], site["role"]) for site in told["sites"]] == [
        *((site, "training") for site in TRAINING),
        (HELD_OUT, "held_out"),
    ]


def test_the_file_holds_what_was_printed(told: dict[str, Any], written: dict[str, Any]) -> None:
    for key in set(told) - {"run"}:
        assert written[key] == told[key]
    assert set(written["counts"]) == set(SITES)


def test_every_metric_follows_from_the_stored_counts(written: dict[str, Any]) -> None:
    for site, by_model in written["counts"].items():
        for model, sparse in by_model.items():
            counts = Counts.from_json(sparse)
            auroc, (low, high) = counts.auroc(), counts.interval()
            for position, name in enumerate(DEFAULT_LABELS):
                found = written["matrix"][model][site][name]
                assert (found["n_pos"], found["n_neg"]) == (counts.n_pos[position], counts.n_neg[position])
                for key, expected in (("auroc", auroc), ("low", low), ("high", high)):
                    assert (found[key] is None and math.isnan(expected[position])) or found[
                        key
                    ] == pytest.approx(expected[position])


def test_the_headline_follows_from_the_metrics(written: dict[str, Any]) -> None:
    """Means of the artifacts that every model can estimate at a site; None where there is none."""
    averaged = written["averaged"]

    def mean(model: str, sites: Sequence[str]) -> Any:
        at = [
            np.mean([written["matrix"][model][site][name]["auroc"] for name in averaged[site]])
            for site in sites
            if averaged[site]
        ]
        return pytest.approx(np.mean(at)) if at else None

    for arm in SHARED:
        found = written["headline"][arm]
        assert (found["home"], found["unseen"]) == (mean(arm, TRAINING), mean(arm, [HELD_OUT]))
        assert found["unseen"] is not None
    owners = [mean(f"local/{owner}", [HELD_OUT]) for owner in TRAINING]
    assert written["headline"]["local"]["unseen"] == pytest.approx(np.mean([one.expected for one in owners]))


def test_the_run_folder_is_laid_out_as_designed(finished: Finished, written: dict[str, Any]) -> None:
    out = finished.out
    for name in ("plan.yaml", "manifest.json", "evaluation.json", "model.safetensors"):
        assert (out / name).is_file()
    assert not (out / "rounds.jsonl").exists()
    assert not (out / "checkpoints").exists()
    for name in ARM_FOLDERS:
        folder = out / "arms" / name
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
            "round-0001.safetensors",
            "round-0002.safetensors",
        ]
        assert len((folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()) == 2
        assert (folder / "model.safetensors").is_file()
    assert [path.relative_to(out) for path in out.rglob("evaluation.json")] == [Path("evaluation.json")]
    assert not [
        path for path in out.rglob("*") if path.name.startswith(".") or path.suffix in {".pkl", ".pt", ".tmp"}
    ]


def test_the_model_of_the_run_is_the_private_one(finished: Finished, told: dict[str, Any]) -> None:
    tensors = {
        name: safetensors.numpy.load_file(finished.out / name)
        for name in ("model.safetensors", "arms/federated_dp/model.safetensors")
    }
    first, second = tensors.values()
    assert all(np.array_equal(first[name], second[name]) for name in second)


def test_only_the_head_of_the_private_model_moved(finished: Finished, told: dict[str, Any]) -> None:
    start = safetensors.numpy.load_file(
        Path(__file__).parents[2] / "common" / "models" / "small_cnn_real.safetensors"
    )
    end = safetensors.numpy.load_file(finished.out / "arms" / "federated_dp" / "model.safetensors")
    moved = {name for name in start if not np.array_equal(start[name], end[name])}
    assert moved == {"head.weight", "head.bias"}


def test_the_manifest_says_what_made_the_run(finished: Finished, told: dict[str, Any]) -> None:
    manifest = json.loads((finished.out / "manifest.json").read_text(encoding="utf-8"))
    plan = read_plan(finished.out / "plan.yaml")
    assert plan == with_noise(read_plan(finished.plan))
    assert (manifest["plan_sha256"], manifest["seed"], manifest["threads"], manifest["status"]) == (
        plan.sha256(),
        3,
        1,
        "completed",
    )
    assert {"fedqc", "flwr", "torch", "opacus", "numpy", "pydicom", "python"} <= set(manifest["versions"])


def test_nothing_in_the_run_folder_names_a_path_or_a_patient_of_a_site(
    finished: Finished, told: dict[str, Any]
) -> None:
    """`simulation.json` remembers where the data lie and stays on this machine."""
    for path in finished.out.rglob("*"):
        if path.is_file() and path.name != "simulation.json":
            content = path.read_bytes()
            for hidden in (b"PHANTOM-", b".dcm", str(finished.data).encode(), b"labels.csv"):
                assert hidden not in content, path


def test_the_report_is_one_page_without_the_network(finished: Finished, told: dict[str, Any]) -> None:
    before = (finished.out / "evaluation.json").read_bytes()
    said = fedqc("report", finished.out)
    assert said.returncode == 0, said.stderr
    page = (finished.out / "report.html").read_text(encoding="utf-8")
    assert Path(said.stdout.strip()) == finished.out / "report.html"
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert all(site in page for site in SITES)
    assert (finished.out / "evaluation.json").read_bytes() == before


def test_the_same_plan_gives_the_same_bits_in_another_process(
    finished: Finished, told: dict[str, Any], tmp_path: Path
) -> None:
    """Once more, one arm, as text: a single-arm run has no `arms/`, and says that it is not private."""
    plan = write_plan(tmp_path / "tiny.yaml", arms=["federated"])
    said = fedqc(*simulate_words(plan, finished.data, tmp_path / "run"))
    assert said.returncode == 0, said.stderr
    assert not (tmp_path / "run" / "arms").exists()
    assert (tmp_path / "run" / "rounds.jsonl").is_file()
    assert (tmp_path / "run" / "checkpoints" / "round-0002.safetensors").is_file()
    first = safetensors.numpy.load_file(tmp_path / "run" / "model.safetensors")
    second = safetensors.numpy.load_file(finished.out / "arms" / "federated" / "model.safetensors")
    assert {name: hashlib.sha256(tensor.tobytes()).digest() for name, tensor in first.items()} == {
        name: hashlib.sha256(tensor.tobytes()).digest() for name, tensor in second.items()
    }
    assert "NOT PRIVATE" in said.stdout
    assert str(tmp_path / "run") in said.stdout


def test_images_stay_where_they_are(finished: Finished, told: dict[str, Any], tiny_consortium: Path) -> None:
    """A run writes to the state folders only: images, labels and site.yaml are as they were."""
    for site in SITES:
        for folder, _, files in os.walk(tiny_consortium / site):
            for name in files:
                path = Path(folder, name)
                if "state" not in path.parts:
                    assert (
                        finished.data / path.relative_to(tiny_consortium)
                    ).read_bytes() == path.read_bytes()


def test_the_cohorts_beside_the_scores_count_the_same_patients(
    finished: Finished, written: dict[str, Any]
) -> None:
    tables = json.loads((finished.out / "cohorts.json").read_text(encoding="utf-8"))
    assert set(tables) == set(SITES)
    for site, table in tables.items():
        assert table["scored"] == ("all" if site in HELD_OUT else "test")
        column = table["columns"][table["scored"]]
        for artifact, row in written["metrics"]["federated"][site].items():
            found = column["artifacts"].get(artifact, {"present": 0, "assessed": 0})
            assert (found["present"], found["assessed"]) == (row["n_pos"], row["n_pos"] + row["n_neg"])
