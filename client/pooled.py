"""What nodes of a simulation do and hospitals do not: train on the images of several sites, fit baselines.

`app` answers for every node of a simulation: for a node with `pooled-sites` in its config it trains on all of
them together, any other node is a hospital's `client.app`, which with `baseline-sites` in its config also
scores the baselines of those sites (client/baselines.py). No hospital loads this module.
"""

from __future__ import annotations

import functools
import os

import numpy as np
from flwr.app import Context, Message

from client.agent.failures import refusal_for
from client.agent.job import Job
from client.agent.tasks import Agent, agent_for
from client.agent.training import (
    ReceivedModels,
    TrainingSlices,
    UpdateOwner,
    site_update,
    train_without_noise,
)
from client.agent.verification import plan_of
from client.app import answer
from client.app import app as hospital_app
from common.arms import POOLED
from common.errors import RunError
from common.plan import RunPlan
from common.studies import concatenated
from common.wire import (
    DescribeTask,
    Envelope,
    SiteDescription,
    SiteUpdate,
    TrainTask,
    WireMessage,
    type_of,
)

MEMBERS = "pooled-sites"
"""Key of the node config: paths of site.yaml files, joined by the path separator."""
BASELINES = "baseline-sites"
"""Key of the node config of a site: the paths of those that train, joined likewise."""
NAME = POOLED
"""Of the pooled site: that of its arm."""


def app(message: Message, context: Context) -> Message:
    """Answer a message as the node of `context`."""
    config = context.node_config
    if BASELINES in config:
        from client.baselines import baseline_scores  # scikit-learn: an extra, and a second of CPU

        plan = plan_of(str(context.run_config["plan"]))
        agent = agent_for(str(config["site-config"]), plan)
        training = tuple(str(config[BASELINES]).split(os.pathsep))
        agent.score_baselines = functools.partial(baseline_scores, agent, plan, training)
    if MEMBERS not in config:
        return hospital_app(message, context)
    return answer(message, context, _ask)


def _ask(envelope: Envelope, context: Context) -> Envelope:
    plan = plan_of(str(context.run_config["plan"]))
    pooled = pooled_sites(str(context.node_config[MEMBERS]), plan)
    return Envelope(payload=pooled.answer(envelope.payload).to_bytes())


@functools.lru_cache(maxsize=8)
def pooled_sites(site_yamls: str, plan: RunPlan) -> PooledSites:
    """One pooled baseline a plan, kept between rounds."""
    return PooledSites([agent_for(path, plan) for path in site_yamls.split(os.pathsep)], plan)


class PooledSites:
    """Several sites as one: describes itself and trains without noise; it is never scored."""

    def __init__(self, agents: list[Agent], plan: RunPlan) -> None:
        self._agents, self._plan = agents, plan
        self._models = ReceivedModels(plan)

    def answer(self, payload: bytes) -> WireMessage:
        """The answer to the bytes of a task, or a refusal."""
        run = ""
        try:
            if type_of(payload) == DescribeTask.__name__:
                return self.describe()
            task = TrainTask.from_bytes(payload)
            run = task.run
            return self.train(task)
        except Exception as failure:
            return refusal_for(failure, site=NAME, run=run, state=self._agents[0].state, plan=self._plan)

    def describe(self) -> SiteDescription:
        """The first site's description, with the names of all and the sum of their patients; of kind hospital
        where one of them is one.
        """
        described = self._agents[0].describe()
        assert isinstance(described, SiteDescription)
        kinds = [agent.site.kind for agent in self._agents]
        return described.model_copy(
            update={
                "kind": "hospital" if "hospital" in kinds else kinds[0],
                "site": NAME,
                "members": tuple(agent.name for agent in self._agents),
                "nominal_patients": self._num_patients,
                "ledger_head": "",  # it has no ledger
            }
        )

    def train(self, task: TrainTask) -> SiteUpdate:
        """Train one round on the training slices of all sites.

        Raises:
            RefusedError: the policy of a site does not permit training without noise, or a hospital does not
                state its ethics approval.
            RunError: the task is private (code `bad-message`).
        """
        if task.private:
            raise RunError("the pooled baseline is not private", code="bad-message")
        for agent in self._agents:
            agent.renew_consent()
            agent.admit(private=False)
        base = self._models.receive(task)
        changed = [agent.bind_data(task.run) for agent in self._agents]  # every site, not up to the first
        for agent in self._agents:
            agent.record_non_private(task.run, task.arm)
        steps = train_without_noise(self._plan, task, base, NAME, self._slices(task.run), Job())
        owner = UpdateOwner(name=NAME, nominal_patients=self._num_patients)
        return site_update(self._plan, task, base, steps, owner, data_changed=any(changed))

    @property
    def _num_patients(self) -> int:
        return sum(agent.site.nominal_patients for agent in self._agents)

    def _slices(self, run: str) -> TrainingSlices:
        """The training slices of all sites, side by side, in the order of the sites."""
        parts = [agent.training_slices(run, Job()) for agent in self._agents]
        if len(parts) == 1:
            return parts[0]
        images = concatenated([(part.images, part.rows) for part in parts])
        modality, labels = (
            np.concatenate([getattr(part, name)[part.rows] for part in parts])
            for name in ("modality", "labels")
        )
        weights = None
        if all(part.weights is not None for part in parts):
            weights = np.concatenate([part.weights[part.rows] for part in parts if part.weights is not None])
        rows = np.arange(len(images))
        return TrainingSlices(images=images, modality=modality, labels=labels, rows=rows, weights=weights)
