"""The public model is made by the commands its card names: phantoms, a plan, whitening."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import yaml

import common.models
from common.artifacts import DEFAULT_LABELS
from common.learning import extract_features, score
from common.lineage import lineage_of_plan, read_lineage
from common.model_file import load_model
from common.models import build, fresh
from common.models.small_cnn import SmallCNN
from common.physics.appearance import PUBLIC_APPEARANCES
from common.plan import read_plan
from common.pricing import with_noise
from common.public_phantoms import draw
from common.weights import digest, flatten, manifest_of, resolve_initial
from server.public_model.pretrain import card, finish, public_lineage
from server.run_folder import RunFolder
from tests.helpers.command_line import ROOT, fedqc
from tests.helpers.injected import mr_slice, write

PLAN = ROOT / "configs" / "plans" / "pretrain_phantom.yaml"
REAL_PLAN = PLAN.with_name("pretrain_real.yaml")
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
    assert auroc.shape == (len(DEFAULT_LABELS),)
    np.testing.assert_allclose(score(model, slices.images, slices.modality, rows), before, atol=1e-4)
    covariance = np.cov(extract_features(model, slices.images, slices.modality, rows).T)
    variances = np.diag(covariance)
    assert variances[0] == pytest.approx(1, abs=1e-3)
    assert variances.max() < 1.01
    assert np.abs(covariance - np.diag(variances)).max() < 1e-3
    text = card(run, "small_cnn_phantoms", "ab" * 32, auroc)
    assert run.plan.sha256()[:12] in text
    assert "ab" * 32 in text
    assert "{" not in text


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The steps of `make real-start`, small."""
    folder = tmp_path_factory.mktemp("real-start")
    for person in range(6):
        write(folder / "source" / f"{person}.dcm", mr_slice(person, person), f"P-{person}", 0)
    artifacts = [word for name in read_plan(REAL_PLAN).model.labels for word in ("--artifact", name)]
    fedqc("data", "inject", folder / "source", folder / "start", "--views", 12, "--seed", 1, *artifacts)
    fedqc("data", "phantom", folder / "phantoms", "--public", "--patients", 12, "--seed", 1, "--ct-motion")
    (folder / "phantoms" / "public").rename(folder / "start" / "public")
    values = yaml.safe_load(REAL_PLAN.read_text(encoding="utf-8"))
    values |= {
        "training": values["training"] | {"rounds": 1},
        "image_size": 32,
        "public_set": {"patients": 6},
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    fedqc("simulate", folder / "plan.yaml", "--data", folder / "start", "--out", folder / "run", "--jobs", 1)
    return RunFolder.open(folder / "run")


def test_a_run_on_people_and_phantoms_goes_on_from_the_phantoms_start(real_run: RunFolder) -> None:
    labels = real_run.plan.model.labels
    manifest = manifest_of(build("small_cnn", labels=labels).state_dict())
    trained = load_model(real_run.path / "model.safetensors", manifest)
    start = load_model(
        resolve_initial(real_run.plan.model.initial, real_run.plan.model.sha256), manifest, labels
    )
    assert 0 < np.abs(trained - start).max() < 1
    sites = {site["site"]: site["kind"] for site in real_run.manifest["sites"]}
    assert {sites["people"], sites["public"]} == {"public"}
    lineage = public_lineage(real_run, trained)
    assert lineage.kinds == ("public", "synthetic")
    assert lineage.private
    assert digest(start) in lineage.ancestors


def test_the_card_of_the_real_start_names_data_licences_command_seed_and_hash(real_run: RunFolder) -> None:
    text = card(real_run, "small_cnn_real", "ab" * 32, np.full(len(real_run.plan.model.labels), 0.9))
    words = ("CC BY 4.0", "CC BY 3.0", "10.6084/m9.figshare.1512427", "make real-start", "ab" * 32)
    for word in (*words, f"seed {real_run.plan.seed}", real_run.plan.sha256()[:12]):
        assert word in text
    assert "{" not in text


def test_the_shipped_real_start_is_made_of_public_data_and_its_card_is_whole() -> None:
    path = MODELS / "small_cnn_real.safetensors"
    lineage = read_lineage(path)
    assert lineage is not None
    assert lineage.private
    assert lineage.kinds == ("public", "synthetic")
    assert lineage == lineage_of_plan("package:small_cnn_real.safetensors", path)
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert sha256(path.read_bytes()).hexdigest() in text
    assert with_noise(read_plan(REAL_PLAN)).sha256()[:12] in text  # as a run records it
    template = (ROOT / "server" / "public_model" / "card_real.md").read_text(encoding="utf-8")
    licences = template[template.index("## Images") : template.index("## Before")]
    assert licences in text
    assert "| MR macro, visible |" in text, "the table of benchmarks/real_start.py"


def test_the_shipped_model_is_the_one_its_card_and_the_demo_name() -> None:
    found = sha256((MODELS / "small_cnn_phantoms.safetensors").read_bytes()).hexdigest()
    assert found in (MODELS / "small_cnn_phantoms.md").read_text(encoding="utf-8")
    assert read_plan(ROOT / "configs" / "plans" / "demo.yaml").model.sha256 == found
    trained_by = read_plan(PLAN)
    trained_by = trained_by.model_copy(  # the default of then
        update={"privacy": trained_by.privacy.model_copy(update={"epsilon": 8.0})}
    )
    assert trained_by.sha256()[:12] in (MODELS / "small_cnn_phantoms.md").read_text(encoding="utf-8")
