"""The public model is made by the commands its card names: phantoms, a plan, whitening."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

import common.models
from common.artifacts import NAMES
from common.learning import extract_features, score
from common.model_file import load_model
from common.models import build, fresh
from common.models.small_cnn import SmallCNN
from common.physics.appearance import PUBLIC_APPEARANCES
from common.plan import read_plan
from common.weights import flatten, manifest_of
from server.public_model.pretrain import card, finish
from server.public_model.public_set import draw
from server.run_folder import RunFolder
from tests.helpers.command_line import ROOT, fedqc

PLAN = ROOT / "configs" / "plans" / "pretrain_phantom.yaml"
MODELS = Path(common.models.__file__).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("pretrain")
    fedqc("data", "phantom", folder / "public", "--public", "--patients", 18, "--seed", 1)
    values = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    values |= {
        "training": values["training"] | {"rounds": 2},
        "image_size": 32,
        "public_set": {"patients": 6},
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    fedqc("simulate", folder / "plan.yaml", "--data", folder / "public", "--out", folder / "run", "--jobs", 1)
    return RunFolder.open(folder / "run")


def test_a_run_from_fresh_weights_trains_on_one_public_site(run: RunFolder) -> None:
    manifest = manifest_of(build("small_cnn").state_dict())
    trained = load_model(run.path / "model.safetensors", manifest)
    start = flatten(fresh("small_cnn", run.plan.seed).state_dict())
    assert not np.array_equal(trained, start)
    assert np.array_equal(start, flatten(fresh("small_cnn", run.plan.seed).state_dict()))
    assert run.manifest["status"] == "completed"
    assert [site["kind"] for site in run.manifest["sites"]] == ["public"]


def test_what_the_head_sees_is_whitened_and_no_logit_changes(run: RunFolder) -> None:
    model = fresh("small_cnn", 3)
    assert isinstance(model, SmallCNN)
    slices = draw(PUBLIC_APPEARANCES, 40, 515151, 32)
    rows = np.arange(len(slices.images))
    before = score(model, slices.images, slices.modality, rows)
    auroc = finish(model, patients=40, size=32)
    assert auroc.shape == (len(NAMES),)
    np.testing.assert_allclose(score(model, slices.images, slices.modality, rows), before, atol=1e-4)
    covariance = np.cov(extract_features(model, slices.images, slices.modality, rows).T)
    variances = np.diag(covariance)
    assert variances[0] == pytest.approx(1, abs=1e-3)
    assert variances.max() < 1.01
    assert np.abs(covariance - np.diag(variances)).max() < 1e-3
    text = card(run, "ab" * 32, auroc)
    assert run.plan.sha256()[:12] in text
    assert "ab" * 32 in text
    assert "{" not in text


def test_the_shipped_model_is_the_one_its_card_and_the_demo_name() -> None:
    from hashlib import sha256

    digest = sha256((MODELS / "small_cnn.safetensors").read_bytes()).hexdigest()
    assert digest in (MODELS / "small_cnn.md").read_text(encoding="utf-8")
    assert read_plan(ROOT / "configs" / "plans" / "demo.yaml").model.sha256 == digest
    trained_by = read_plan(PLAN)
    trained_by = trained_by.model_copy(  # the default of then
        update={"privacy": trained_by.privacy.model_copy(update={"epsilon": 8.0})}
    )
    assert trained_by.sha256()[:12] in (MODELS / "small_cnn.md").read_text(encoding="utf-8")
