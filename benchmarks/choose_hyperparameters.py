"""Which learning rates should plans default to? Chosen on rehearsal hospitals, which are public phantoms,
never on a site.

    python benchmarks/choose_hyperparameters.py

Three rehearsal hospitals are the public appearances made noisier, smoother or of another contrast, with seeds
of their own. None is an appearance of a phantom site. Prints macro AUROC (mean over the hospitals' test
patients) for each learning rate of the private head, with its noise, and of the full model.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from client.dp.dp_sgd import PrivateSteps, train_private_head
from common import counts
from common.learning import extract_features, score, set_threads, train_epochs
from common.model_file import load_model
from common.models import build
from common.physics.appearance import PUBLIC_APPEARANCES, Appearance
from common.plan import Training
from common.privacy import noise_multiplier_for
from common.public_phantoms import draw
from common.public_slices import Slices
from common.weights import flatten, manifest_of, to_grid, unflatten
from server.aggregation import FederatedMean

FIRST, SECOND = (
    replace(one, nuisances={}, oriented=(0.0, 0.0, 0.0), severity_range=(0.4, 1.0))
    for one in PUBLIC_APPEARANCES[:2]
)
REHEARSAL: tuple[Appearance, ...] = (
    replace(
        FIRST,
        name="rehearsal_a",
        mr_contrasts=("T2", "PD"),
        noise_percent=(4.0, 5.0),
        ct_noise_hu=(12.0, 16.0),
        mr_bodies=("brain",),
    ),
    replace(
        SECOND,
        name="rehearsal_b",
        bias=(0.3, 0.45),
        rolloff=(0.0, 0.2),
        phase_encoding="ROW",
        kernel=(0.3, 0.5),
        enhanced=0.1,
    ),
    replace(
        FIRST,
        name="rehearsal_c",
        mr_bodies=("brain", "legs"),
        rolloff=(0.6, 0.9),
        kernel=(-0.9, -0.7),
        ct_bodies=("thorax", "pelvis"),
    ),
)
PATIENTS, NOMINAL, ROUNDS = 340, 200, 6


def auroc(logits: np.ndarray, slices: Slices, rows: np.ndarray) -> float:
    patients = counts.per_patient(logits, slices.labels[rows], slices.patients[rows])
    return float(np.nanmean(counts.auroc(*patients)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--start", type=Path, default=Path("common/models/small_cnn_phantoms.safetensors"))
    parser.add_argument("--only", choices=("private", "full"))
    arguments = parser.parse_args()
    set_threads(1)
    model = build("small_cnn")
    manifest = manifest_of(model.state_dict())
    start = load_model(arguments.start, manifest)
    sites = [draw([appearance], PATIENTS, 31337 + number, 128) for number, appearance in enumerate(REHEARSAL)]
    train = [np.flatnonzero(site.patients < 0.6 * PATIENTS) for site in sites]
    test = [np.flatnonzero(site.patients >= 0.6 * PATIENTS) for site in sites]

    model.load_state_dict(unflatten(start, manifest))
    zero = [
        auroc(score(model, s.images, s.modality, rows), s, rows) for s, rows in zip(sites, test, strict=True)
    ]
    print(f"start: {np.round(zero, 3)} mean {np.mean(zero):.3f}")
    if arguments.only != "full":
        features = [extract_features(model, s.images, s.modality, np.arange(len(s.images))) for s in sites]
        head = (model.head.weight.detach().numpy(), model.head.bias.detach().numpy())
        noise = noise_multiplier_for(8.0, 1e-5, 1.0, ROUNDS)
        for rate in (0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0):
            gains = []
            for _ in range(5):
                weight, bias = head
                for _ in range(ROUNDS):
                    answers = [
                        train_private_head(
                            weight,
                            bias,
                            f[rows],
                            s.labels[rows],
                            s.patients[rows],
                            PrivateSteps(
                                steps=1,
                                learning_rate=rate,
                                clip_norm=1.0,
                                noise_multiplier=noise,
                                sample_rate=1.0,
                                nominal_patients=NOMINAL,
                                max_slices_per_patient=4,
                            ),
                        )
                        for f, s, rows in zip(features, sites, train, strict=True)
                    ]
                    weight = np.mean([answer.weight for answer in answers], axis=0)
                    bias = np.mean([answer.bias for answer in answers], axis=0)
                gains.append(
                    [
                        auroc(f[rows] @ weight.T + bias, s, rows)
                        for f, s, rows in zip(features, sites, test, strict=True)
                    ]
                )
            found = np.mean(gains, axis=0)
            print(
                f"private head, learning rate {rate:5.1f}: {np.round(found, 3)} mean {found.mean():.3f}, "
                f"sd {np.std(np.mean(gains, 1)):.3f}"
            )
    if arguments.only != "private":
        for rate in (2.5e-4, 5e-4, 1e-3, 2e-3):
            weights = start
            for number in range(ROUNDS):
                mean = FederatedMean(manifest.size)
                for position, (s, rows) in enumerate(zip(sites, train, strict=True)):
                    model.load_state_dict(unflatten(weights, manifest))
                    training = Training(learning_rate=rate)
                    train_epochs(
                        model,
                        s.images,
                        s.modality,
                        s.labels,
                        rows,
                        training=training,
                        seed=100 * number + position,
                    )
                    mean.add(to_grid(flatten(model.state_dict()), weights), 1)
                weights = mean.result(weights)
            model.load_state_dict(unflatten(weights, manifest))
            found = [
                auroc(score(model, s.images, s.modality, rows), s, rows)
                for s, rows in zip(sites, test, strict=True)
            ]
            print(f"federated, learning rate {rate:g}: {np.round(found, 3)} mean {np.mean(found):.3f}")


if __name__ == "__main__":
    main()
