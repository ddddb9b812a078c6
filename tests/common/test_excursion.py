"""What is known of the noise before a run is what the private step then adds."""

from __future__ import annotations

import numpy as np
import pytest

from client.dp.dp_sgd import PrivateSteps, train_private_head
from common.excursion import SIGMAS, update_deviation, update_excursion
from common.plan import parse_plan
from common.pricing import training_steps, with_noise


def test_the_deviation_is_that_of_a_private_update_of_nobody() -> None:
    plan = with_noise(
        parse_plan(
            {
                "name": "x",
                "arms": ["federated_dp"],
                "training": {"rounds": 3, "local_epochs": 4},
                "privacy": {"epsilon": 2.0, "learning_rate": 1.7, "clip_norm": 0.4},
            }
        )
    )
    privacy = plan.privacy
    trained = train_private_head(
        np.zeros((5, 2000), np.float32),
        np.zeros(5, np.float32),
        np.zeros((0, 2000), np.float32),
        np.zeros((0, 5), np.float32),
        np.zeros(0, np.int64),
        PrivateSteps(
            steps=plan.private_steps_per_round,
            learning_rate=privacy.learning_rate,
            clip_norm=privacy.clip_norm,
            noise_multiplier=training_steps(plan).noise_multiplier,
            sample_rate=privacy.sample_rate,
            nominal_patients=50,
            max_slices_per_patient=4,
        ),
    )
    assert np.std(trained.weight) == pytest.approx(update_deviation(plan, 50), rel=0.05)
    assert np.abs(trained.weight).max() < update_excursion(plan, 50) == SIGMAS * update_deviation(plan, 50)
