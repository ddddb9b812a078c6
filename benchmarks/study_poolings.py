"""Does a network of studies tell patients with an artifact better than the scores of slices?

python benchmarks/study_poolings.py [--quick] [--format json] [--update docs/networks.md]

slices    `small_cnn` trained on slices; a patient's score is that of `common.counts.patient_scores`.
mean ...  `study` with that pooling, trained on studies; as many slices a step.

All start from the slice network's shipped weights, attention and GRU from the seed, and train the whole
network on phantoms of the appearances of the demo's hospitals; a repetition is a seed, with other patients to
train on. The patients who are tested are the same throughout. Intervals are over these patients (DeLong,
paired), of the mean over seeds; they do not hold what other seeds or phantoms would give.
"""

from __future__ import annotations

import sys
from typing import Any

from measuring import command_line, environment, repetitions_of, reported, say

POOLINGS = ("mean", "max", "attention", "gru")
REFERENCE = "slices"
SIDE_PX, SLICES = 128, 4
TEST_SEED, TRAIN_SEED = 90001, 91001
SLICES_A_BATCH, STUDIES_A_BATCH = 16, 6
"""About as many slices: phantoms have 2 or 3."""


def measure_all(work: dict[str, int], seeds: int) -> dict[str, Any]:
    """Macro AUROC of every side and seed, and the differences to the reference."""
    import numpy as np

    from common.counts import auroc_covariance
    from common.learning import set_threads
    from common.physics.appearance import SITE_APPEARANCES
    from common.public_phantoms import draw

    set_threads(1)
    started_with = environment(("fedqc", "torch", "numpy"))
    test = draw(SITE_APPEARANCES, work["test"], TEST_SEED, SIDE_PX)
    scores: dict[str, list[Any]] = {side: [] for side in (REFERENCE, *POOLINGS)}
    truth = None
    for seed in range(seeds):
        train = draw(SITE_APPEARANCES, work["train"], TRAIN_SEED + 100 * seed, SIDE_PX)
        for side, found in scores.items():
            logits, truth = score_side(side, train, test, work["epochs"], seed)
            found.append(logits)
            say(f"seed {seed} {side}: {macro(logits, truth):.3f}")
    assert truth is not None
    flat = [one for found in scores.values() for one in found]
    covariance = auroc_covariance(flat, truth)
    artifacts = truth.shape[1]
    sides: dict[str, Any] = {}
    for place, (side, found) in enumerate(scores.items()):
        values = [macro(one, truth) for one in found]
        contrast = np.zeros(len(flat))
        contrast[place * seeds : (place + 1) * seeds] += 1 / seeds
        contrast[:seeds] -= 1 / seeds
        weights = np.repeat(contrast, artifacts) / artifacts
        error = float(np.sqrt(max(0.0, weights @ covariance @ weights)))
        difference = float(np.mean(values)) - float(np.mean([macro(one, truth) for one in scores[REFERENCE]]))
        sides[side] = {
            "auroc": values,
            "difference": difference,
            "interval": [difference - 1.96 * error, difference + 1.96 * error],
        }
    return {
        "benchmark": "study_poolings",
        "environment": started_with,
        "work": work | {"seeds": seeds},
        "positives": [int((truth[:, one] == 1).sum()) for one in range(artifacts)],
        "negatives": [int((truth[:, one] == 0).sum()) for one in range(artifacts)],
        "in_some_slices": share_in_some_slices(test),
        "sides": sides,
    }


def macro(logits: Any, truth: Any) -> float:
    """The mean AUROC over artifacts."""
    from common.counts import auroc

    return float(auroc(logits, truth).mean())


def share_in_some_slices(slices: Any) -> float:
    """Of the patients who show an artifact, summed over artifacts, how many do not show it in every slice."""
    from common.counts import patient_labels

    most = patient_labels(slices.labels, slices.patients)
    least = -patient_labels(-slices.labels, slices.patients)
    return float((least[most == 1] == 0).mean())


def score_side(side: str, train: Any, test: Any, epochs: int, seed: int) -> tuple[Any, Any]:
    """Train one side; scores and labels of the test patients, each (patients, artifacts)."""
    import numpy as np

    from common.counts import per_patient
    from common.learning import score, train_epochs
    from common.model_file import load_model
    from common.models import build, fresh
    from common.plan import Model, Training
    from common.weights import manifest_of, resolve_initial, unflatten
    from server.public_model.public_set import public_samples

    model = Model() if side == REFERENCE else Model(name="study", args={"pooling": side, "slices": SLICES})
    network = fresh(model.name, seed, model.args)
    manifest = manifest_of(build(Model().name).state_dict())
    start = unflatten(load_model(resolve_initial(Model().initial, None), manifest, Model().labels), manifest)
    own = network.state_dict()
    fits = {name: tensor for name, tensor in start.items() if own[name].shape == tensor.shape}
    network.load_state_dict(own | fits)
    samples, tested = public_samples(train, model), public_samples(test, model)
    train_epochs(
        network,
        samples.images,
        samples.modality,
        samples.labels,
        np.arange(len(samples.images)),
        training=Training(
            local_epochs=epochs, batch_size=SLICES_A_BATCH if side == REFERENCE else STUDIES_A_BATCH
        ),
        seed=seed,
    )
    logits = score(network, tested.images, tested.modality, np.arange(len(tested.images)))
    return per_patient(logits, tested.labels, tested.patients)


def table(result: dict[str, Any]) -> str:
    """Markdown: one row a side."""
    lines = ["| | macro AUROC a patient, each seed | minus `slices` (95 % interval) |", "|---|---|---|"]
    for side, one in result["sides"].items():
        low, high = one["interval"]
        difference = "–" if side == REFERENCE else f"{one['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        lines.append(f"| {side} | {', '.join(f'{value:.3f}' for value in one['auroc'])} | {difference} |")
    work, env = result["work"], result["environment"]
    versions = ", ".join(f"{package} {number}" for package, number in env["versions"].items())
    with_artifact, without = result["positives"], result["negatives"]
    lines += [
        "",
        f"n = {work['test']} test patients (by artifact {min(with_artifact)} to {max(with_artifact)} with, "
        f"{min(without)} to {max(without)} without it), {work['seeds']} seeds, each with {work['train']} "
        f"other patients and {work['epochs']} epochs; 2 or 3 slices a patient. "
        f"{result['in_some_slices']:.0%} of the artifacts of a patient are not in all slices.",
        "",
        f"{env['date']}, {env['machine']}; Python {env['python']}, {versions}.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = command_line(__doc__, quick="24 patients to train on and 48 to test, 1 epoch", usual=2)
    arguments = parser.parse_args()
    work = (
        {"train": 24, "test": 48, "epochs": 1} if arguments.quick else {"train": 80, "test": 160, "epochs": 3}
    )
    return reported("study_poolings", arguments, lambda: measure_all(work, repetitions_of(arguments)), table)


if __name__ == "__main__":
    sys.exit(main())
