"""A hospital of phantoms in a folder of its own, whose agent the checks ask as a coordinator would."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import yaml

from client.agent import tasks
from client.dp import dp_sgd
from client.privacy_checks.finding import Scene
from client.privacy_checks.mechanism import Released, releases
from client.simulation.phantom_sites import write_site
from client.site.config import read_site
from client.site.ledger import Ledger
from client.site.ledger_rows import LedgerRow
from client.site.site_ledger import init_ledger
from common.artifacts import DEFAULT_LABELS
from common.model_file import load_model
from common.models import build
from common.physics.appearance import SITE_APPEARANCES
from common.plan import RunPlan
from common.trainable import private_part
from common.weights import decode_steps, manifest_of, part_size, resolve_initial
from common.wire import SiteUpdate, TrainTask, WireMessage

NAME, ARM = "hospital", "federated_dp"
PATIENTS, NOMINAL, ROUNDS = 12, 50, 2
TEMPLATE = "template"


def site_plan(scene: Scene, **changes: Any) -> RunPlan:
    """The plan's private arm on small images, for the rounds that are checked, with the plan's own noise."""
    training = scene.plan.training.model_copy(update={"rounds": ROUNDS})
    packaged = {"initial": "package:small_cnn.safetensors", "sha256": None, "labels": DEFAULT_LABELS}
    values: dict[str, Any] = {
        "arms": (ARM,),
        "held_out": (),
        "image_size": 32,
        "training": training,
        "model": scene.plan.model.model_copy(update=packaged),
        "federation": scene.plan.federation.model_copy(update={"codec": "lossless"}),
    }
    return scene.plan.model_copy(update=values | changes)


def hospital(scene: Scene, name: str, *, policy: dict[str, Any] | None = None) -> Path:
    """A new hospital in the scene's folder, the same patients each time. Its site.yaml is returned."""
    template = scene.folder / TEMPLATE
    if not template.exists():
        write_site(template, NAME, SITE_APPEARANCES[0], patients=PATIENTS, seed=11)
        tasks.prepare(template, site_plan(scene))  # so that its copies have their images decoded
    site = scene.folder / name
    shutil.copytree(template, site)
    cautious = {"max_epsilon": 1000.0, "max_delta": scene.plan.privacy.delta}
    (site / "policy.yaml").write_text(yaml.safe_dump(cautious | (policy or {})), encoding="utf-8")
    (site / "cohort.yaml").write_text("ethics_approval: 2026-17\nconsent_basis: broad consent\n")
    change(site / "site.yaml", kind="hospital", nominal_patients=NOMINAL, policy="policy.yaml", stand_in=None)
    init_ledger(*read_site(site))
    return site / "site.yaml"


def change(site_yaml: Path, **fields: object) -> None:
    """Change fields of site.yaml, as an operator does with an editor."""
    values = yaml.safe_load(site_yaml.read_text(encoding="utf-8")) | fields
    kept = {name: value for name, value in values.items() if value is not None}
    site_yaml.write_text(yaml.safe_dump(kept), encoding="utf-8")


def opt_out(site_yaml: Path, *patient_ids: str) -> None:
    """Patients who withdraw their consent, by their PatientIDs."""
    folder = site_yaml.parent
    text = (folder / "cohort.yaml").read_text(encoding="utf-8").replace("opt_out_file: out.csv\n", "")
    (folder / "cohort.yaml").write_text(f"{text}opt_out_file: out.csv\n", encoding="utf-8")
    lines = "".join(f"{one};2026\n" for one in patient_ids)
    (folder / "out.csv").write_text(f"PatientID;Date\n{lines}", encoding="utf-8")


def patient_id(number: int) -> str:
    """The PatientID of a phantom, as `client.simulation.phantom_sites` writes it."""
    return f"PHANTOM-{number:04d}"


def public_weights() -> np.ndarray:
    """The model that every arm starts from, float32 (parameters,)."""
    manifest = manifest_of(build("small_cnn").state_dict())
    return load_model(resolve_initial("package:small_cnn.safetensors", None), manifest)


def trained_size(plan: RunPlan) -> int:
    """How many values a private update of the plan has."""
    return part_size(private_part(plan))


def train_task(**changes: Any) -> TrainTask:
    """A task of the private arm."""
    values: dict[str, Any] = {
        "run": "check",
        "arm": ARM,
        "round": 1,
        "private": True,
        "base": public_weights(),
    }
    return TrainTask(**values | changes)


def steps_in(update: SiteUpdate, plan: RunPlan) -> np.ndarray:
    """The whole grid steps of an update, int32; as many as the plan trains parameters, else a RunError."""
    size = trained_size(plan)
    return decode_steps(update.update, size) if update.update.dtype == np.uint8 else update.update


@dataclass(kw_only=True)
class Trained:
    """What a hospital answered in the rounds of one run, and what was seen inside meanwhile."""

    answers: list[WireMessage] = field(default_factory=list)
    # of each call of train_private_head or train_private_network
    arguments: list[dict[str, Any]] = field(default_factory=list)
    reserved: list[LedgerRow] = field(default_factory=list)  # the rows on the disk, after each `reserve`
    released: list[Released] = field(default_factory=list)
    order: list[str] = field(default_factory=list)  # "reserve" and "train", as they happened

    @property
    def updates(self) -> list[SiteUpdate]:
        """The answers that are updates."""
        return [answer for answer in self.answers if isinstance(answer, SiteUpdate)]


@contextmanager
def watched() -> Iterator[Trained]:
    """Watch the agent's calls of training and ledger; all of it is carried out."""
    seen = Trained()
    real_reserve = Ledger.reserve

    def noting(real: Callable[..., Any], *first: str) -> Callable[..., Any]:
        def train(*arguments: Any, **named: Any) -> Any:
            names = (*first, "labels", "patients", "request")
            seen.arguments.append(dict(zip(names, arguments, strict=False)) | named)
            seen.order.append("train")
            return real(*arguments, **named)

        return train

    def reserve(self: Ledger, **asked: Any) -> Any:
        made = real_reserve(self, **asked)
        rows = [row for row in self.rows() if row.kind == "reserve" and row.request == asked["request"]]
        seen.reserved += rows[-1:]
        seen.order.append("reserve")
        return made

    with (
        patch.object(
            dp_sgd,
            "train_private_head",
            noting(dp_sgd.train_private_head, "weight", "bias", "features"),
        ),
        patch.object(
            dp_sgd,
            "train_private_network",
            noting(dp_sgd.train_private_network, "network", "trained", "inputs"),
        ),
        patch.object(Ledger, "reserve", reserve),
        releases() as seen.released,
    ):
        yield seen


def run_at(site_yaml: Path, plan: RunPlan, *, run: str = "check", rounds: int = ROUNDS) -> Trained:
    """All rounds of a run at one hospital, by a new agent, from the public model each time."""
    agent = tasks.Agent(site_yaml, plan)
    with watched() as seen:
        for number in range(1, rounds + 1):
            seen.answers.append(agent.train(train_task(run=run, round=number)))
    return seen
