"""Check what the agent gives to the training, what it charges for it, and what it sends."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np

from client.agent import tasks
from client.privacy_checks.finding import Finding, Scene
from client.privacy_checks.hospital import (
    NOMINAL,
    ROUNDS,
    Trained,
    hospital,
    opt_out,
    patient_id,
    run_at,
    site_plan,
    steps_in,
    train_task,
    trained_size,
)
from common.artifacts import DEFAULT_LABELS
from common.errors import RunError
from common.models import as_classifier, network_of
from common.plan import RunPlan
from common.pricing import training_steps
from common.privacy import epsilon_of
from common.weights import GRID
from common.wire import DescribeTask, Refusal, WireMessage

MARKER = "MARKER-4711-Zhang-San"
"""What an operator, a file or a patient might be called; planted where messages could pick it up."""
MIN_WEIGHT_NOISE, MIN_BIAS_NOISE = 0.85, 0.3
"""Of the promised deviation, in four updates: five standard errors and more. Sampling adds to it."""
NOT_OF_PATIENTS = {
    "incident": "random, finds an entry of the site log",
    "seconds_a_round": "time measured on random numbers",
    "ledger_head": "a keyed digest that every entry of the ledger changes",
    "update": "noised: the other checks are about it",
}
"""Fields that may differ although only patients do, and why."""


def everyone(scene: Scene) -> Trained:
    """A run at the hospital with all its patients, made once a scene."""
    return _kept(scene, "everyone")


def _kept(scene: Scene, name: str) -> Trained:
    if name not in scene.kept:
        site_yaml = hospital(scene, name)
        if name == "without":
            opt_out(site_yaml, patient_id(_training_patient(scene)))
        if name == "relabelled":
            sheet = site_yaml.parent / "labels.csv"
            header, *lines = sheet.read_text(encoding="utf-8").splitlines()
            cells = [line.split(",") for line in lines]
            swapped = [
                [one[0], *(_other(cell) for cell in one[1 : len(DEFAULT_LABELS) + 1])] for one in cells
            ]
            names = header.split(",")[: len(DEFAULT_LABELS) + 1]
            sheet.write_text("\n".join(",".join(one) for one in [names, *swapped]) + "\n", encoding="utf-8")
        scene.kept[name] = run_at(site_yaml, site_plan(scene))
    found = scene.kept[name]
    assert isinstance(found, Trained)
    return found


def _other(label: str) -> str:
    return {"0": "1", "1": "0"}.get(label, label)


def _training_patient(scene: Scene) -> int:
    """The number of a phantom in the training part of the hospital."""
    if "patient" not in scene.kept:
        agent = tasks.Agent(hospital(scene, "parts"), site_plan(scene))
        cohort = agent.cohort()
        row = int(np.flatnonzero(cohort.part == 0)[0])
        scene.kept["patient"] = int(cohort.records[row].file[1:5])
    found = scene.kept["patient"]
    assert isinstance(found, int)
    return found


def arguments(scene: Scene) -> Finding:
    """What the agent trains with is what it reserved, and what plan and site ask for."""
    plan, found = site_plan(scene), []
    planned, privacy = training_steps(plan), plan.privacy
    for words, seen in (("", everyone(scene)), ("one patient fewer: ", _kept(scene, "without"))):
        requests = [one["request"] for one in seen.arguments]
        if len(seen.updates) != ROUNDS or len(requests) != ROUNDS or len(seen.reserved) == 0:
            refusal = next((one.code for one in seen.answers if isinstance(one, Refusal)), "no training")
            found.append(f"{words}{len(seen.updates)} of {ROUNDS} rounds answered ({refusal})")
            continue
        row = seen.reserved[0]
        pairs: dict[str, tuple[Any, ...]] = {
            "sample rate": (privacy.sample_rate, row.sample_rate, *(one.sample_rate for one in requests)),
            "noise": (
                planned.noise_multiplier,
                row.noise_multiplier,
                *(one.noise_multiplier for one in requests),
                *(answer.noise_multiplier for answer in seen.updates),
            ),
            "steps": (
                planned.steps,
                row.steps,
                sum(one.steps for one in requests),
                len(seen.released),
            ),
            "clip": (privacy.clip_norm, *(one.clip_norm for one in requests)),
            "learning rate": (privacy.learning_rate, *(one.learning_rate for one in requests)),
            "slices": (privacy.max_slices_per_patient, *(one.max_slices_per_patient for one in requests)),
            "nominal patients": (
                NOMINAL,
                *(one.nominal_patients for one in requests),
                *(answer.weight for answer in seen.updates),
            ),
            "delta": (privacy.delta, *(answer.delta for answer in seen.updates)),
        }
        for name, values in pairs.items():
            if len(set(values)) > 1:
                found.append(f"{words}{name}: {', '.join(f'{value:g}' for value in values)}")
        cost = epsilon_of([row.as_steps()], privacy.delta)
        if any(not (answer.epsilon or 0) >= cost for answer in seen.updates):
            found.append(f"{words}the answer claims a smaller epsilon than what is reserved costs")
        if seen.order[:1] != ["reserve"]:
            found.append(f"{words}training begins before anything is reserved")
    return Finding(
        check="arguments",
        holds=not found,
        measured="; ".join(found[:3])
        or f"z {planned.noise_multiplier:g}, q {planned.sample_rate:g}, {planned.steps} steps, as reserved",
        expected="plan, ledger row, training and answer agree; nothing follows the number of patients",
    )


def leave_one_out(scene: Scene) -> Finding:
    """Where one patient opts out, features and labels of all others stay the same, bit for bit."""
    with_all, without = everyone(scene), _kept(scene, "without")
    if not with_all.arguments or not without.arguments:
        return _nothing_trained("leave one out", with_all)
    number = _training_patient(scene)
    before, after = with_all.arguments[0], without.arguments[0]
    rows, labels = _by_patient(before), _by_patient(after)
    found = []
    if len(rows) != len(labels) + 1:
        found.append(f"{len(rows)} patients with everyone, {len(labels)} without one")
    unmatched = [content for content in rows if content not in labels]
    if len(unmatched) != 1:
        found.append(f"{len(unmatched) - 1} other patients' features or labels change")
    return Finding(
        check="leave one out",
        holds=not found,
        measured="; ".join(found) or f"without phantom {number}: {len(labels)} other patients unchanged",
        expected="features and labels of all others the same, bit for bit",
    )


def _by_patient(arguments: dict[str, Any]) -> list[bytes]:
    """Of each patient the bytes of features or images, labels and weights, sorted, for any numbering."""
    found = []
    injected = arguments.get("injected")
    weights = np.zeros(len(arguments["patients"])) if injected is None else injected.weights
    for number in np.unique(arguments["patients"]):
        of = np.flatnonzero(arguments["patients"] == number)
        inputs = arguments["inputs"](of).numpy() if "inputs" in arguments else arguments["features"][of]
        rows = [
            np.asarray(x, np.float32).tobytes() + np.asarray(y, np.float32).tobytes() + weight.tobytes()
            for x, y, weight in zip(inputs, arguments["labels"][of], weights[of], strict=True)
        ]
        found.append(b"".join(sorted(rows)))
    return found


def coverage(scene: Scene) -> Finding:
    """An update is the parameters that the plan trains and nothing else, and every one carries noise."""
    plan, found = site_plan(scene), []
    first = everyone(scene)
    second = run_at(hospital(scene, "again"), plan)
    if not first.updates or not second.updates:
        return _nothing_trained("coverage", first)
    trained = _counted(plan)
    drawn = []
    for answer in (*first.updates, *second.updates):  # each of them from the same model
        try:
            drawn.append(steps_in(answer, plan).astype(np.float64))
        except RunError as failure:
            found.append(f"the update is not what is trained: {failure.message}")
    sizes = {one.size for one in drawn} | {trained_size(plan), trained}
    if len(sizes) > 1:
        found.append(f"updates of {sorted(sizes)} values, {trained} are trained")
    covered = {one.total.size for one in (*first.released, *second.released)}
    if covered != {trained}:
        found.append(f"noise on {sorted(covered)} values, {trained} are trained")
    ratio = float("nan")
    if not found:
        privacy, head = plan.privacy, as_classifier(network_of(plan.model)).head
        outputs = head.out_features
        deviation = scene.noise_multiplier * privacy.clip_norm / (privacy.sample_rate * NOMINAL)
        expected = privacy.learning_rate * deviation * np.sqrt(plan.private_steps_per_round)
        values = np.stack(drawn) * GRID
        spread = np.sqrt(np.var(values, axis=0, ddof=1))
        ratio = float(np.sqrt(np.square(spread[:-outputs]).mean()) / expected)
        bias = float(np.sqrt(np.square(spread[-outputs:]).mean()) / expected)
        if same := int((spread == 0).sum()):
            found.append(f"{same} values are the same in all trainings")
        if ratio < MIN_WEIGHT_NOISE or bias < MIN_BIAS_NOISE:
            found.append(f"updates vary by {ratio:.2f} (bias {bias:.2f}) of their noise")
    return Finding(
        check="coverage",
        holds=not found,
        measured="; ".join(found) or f"{trained} values; updates vary by {ratio:.2f} of their noise",
        expected=f"the plan's parameters ({plan.privacy.trainable}), all of them noised, and no others",
    )


def _counted(plan: RunPlan) -> int:
    """How many parameters the plan trains, counted layer by layer."""
    network, trainable = network_of(plan.model), plan.privacy.trainable
    layers = [one for one in network.modules() if trainable == "all" or "Norm" in type(one).__name__]
    chosen = [as_classifier(network).head, *(layers if trainable != "head" else [])]
    parameters = {one.data_ptr(): one.numel() for layer in chosen for one in layer.parameters(recurse=False)}
    return sum(parameters.values())


def wire(scene: Scene) -> Finding:
    """Nothing but the noised update changes when patients do, and no name of theirs leaves."""
    found = []
    told = {name: _told(scene, name) for name in ("everyone", "without", "relabelled")}
    for other in ("without", "relabelled"):
        for before, after in zip(told["everyone"], told[other], strict=True):
            if type(before) is not type(after):
                found.append(f"{type(before).__name__} becomes {type(after).__name__}")
                continue
            for name in type(before).model_fields:
                if name in NOT_OF_PATIENTS:
                    continue
                if not _equal(getattr(before, name), getattr(after, name)):
                    found.append(f"{type(before).__name__}.{name} depends on patients")
    if not everyone(scene).updates:
        return _nothing_trained("wire", everyone(scene))
    known = [MARKER, "PHANTOM-", "p0000_0", str(scene.folder)]
    answers = [answer for answers in told.values() for answer in answers] + _failures(scene)
    for answer in answers:
        payload = answer.to_bytes()
        if any(spelling in payload for word in known for spelling in _spellings(word)):
            found.append(f"{type(answer).__name__} holds a name of a patient, file or folder")
    return Finding(
        check="wire",
        holds=not found,
        measured="; ".join(dict.fromkeys(found)) or f"{len(answers)} answers: nothing of a patient",
        expected="other patients and labels change the noised update alone; no identifier leaves",
    )


def _told(scene: Scene, name: str) -> list[WireMessage]:
    """What a hospital tells whoever asks, of each kind of answer."""
    seen = _kept(scene, name)
    agent = tasks.Agent(scene.folder / name / "site.yaml", site_plan(scene))
    return [
        agent.describe(),
        agent.describe(DescribeTask(rehearse=True)),
        *seen.answers,
        agent.train(train_task(round=ROUNDS + 1)),
        agent.train(train_task(run="other", arm="federated", private=False)),
    ]


def _failures(scene: Scene) -> list[WireMessage]:
    """Answers of a hospital whose labels and images are damaged, in words that name a patient."""
    site_yaml = hospital(scene, MARKER)
    (site_yaml.parent / "labels.csv").write_text(f"file,{MARKER}\n{MARKER},{MARKER}\n", encoding="utf-8")
    first = tasks.Agent(site_yaml, site_plan(scene)).train(train_task())
    (site_yaml.parent / "cohort.yaml").write_text(f"{MARKER}: {MARKER}\n", encoding="utf-8")
    return [first, tasks.Agent(site_yaml, site_plan(scene)).train(train_task())]


def _spellings(text: str) -> Iterator[bytes]:
    """The text as it may stand in other bytes."""
    raw = text.encode()
    yield from (raw, raw.lower(), raw.hex().encode(), text.encode("utf-16-le"))
    if len(raw) > 9:
        yield from (base64.b64encode(b"x" * shift + raw)[4 if shift else 0 : -4] for shift in range(3))


def _equal(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return one == other


def _nothing_trained(check: str, seen: Trained) -> Finding:
    codes = [answer.code for answer in seen.answers if isinstance(answer, Refusal)]
    return Finding(
        check=check,
        holds=False,
        measured=f"the hospital did not train ({', '.join(codes) or 'no private training was seen'})",
        expected="a private training",
    )
