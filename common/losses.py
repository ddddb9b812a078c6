"""Losses by name, one number per sample, so that clipping bounds one patient.

Every loss takes logits (B, A) and labels (B, A) and gives shape (B,). Sample i's loss is a function of sample
i alone, so that its gradient is too. A loss that sums over the batch before a ratio (batch Dice, a divisor
that counts the batch's valid labels) would let one patient change another's gradient and void the guarantee;
a property test holds every entry of `LOSSES` to this. `BATCH_LOSSES` do it all the same, for comparison with
publications, in arms that promise nothing.

The artifacts are not exclusive, so that `bce` is binary, one term an artifact. `cross_entropy` is for data of
a single label, where they are: then "none" is a class, too. For a single artifact both are the same, the
logit being the difference of those of two classes.

A label is 1 (present), 0 (absent), a severity between, or nan: not assessed, or the artifact cannot occur in
this modality. Outputs that are nan in the labels take no part in the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from common.artifacts import DEFAULT_LABELS
from common.errors import ConfigError, PlanError
from common.plan import Training
from common.strict import NO_ARGUMENTS, Scalar, checked_arguments

PerSampleLoss = Callable[[Tensor, Tensor], Tensor]

DICE_SMOOTHING = 1.0
BATCH_DICE_SMOOTHING = 1e-5
MAX_GAMMA = 10.0


def masked_bce(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy per sample: the mean over that sample's assessed artifacts, 0 where none is.

    Args:
        logits: shape (B, A).
        labels: shape (B, A), in [0, 1], nan = not assessed.
        weights: shape (A,), public: how much the term of each artifact counts where it is present; None: 1.
    Returns:
        shape (B,).
    """
    assessed, targets = _assessed(logits, labels)
    terms = _weighted_bce(logits, targets, weights)
    return torch.where(assessed, terms, 0.0).sum(dim=1) / assessed.sum(dim=1).clamp(min=1)


def bce(*, class_weights: Tensor | None = None) -> PerSampleLoss:
    """`masked_bce` with these weights of present artifacts."""
    if class_weights is None:
        return masked_bce
    weights = class_weights
    return lambda logits, labels: masked_bce(logits, labels, weights)


def cross_entropy(*, class_weights: Tensor | None = None) -> PerSampleLoss:
    """Cross-entropy per sample over classes that exclude one another: each assessed artifact, and none.

    The logit of "none" is 0, so that an artifact's logit is ln P(artifact) / P(none). A sample with several
    artifacts has its target shared among them; one whose severities sum to less than 1 leaves the rest to
    "none".

    Args:
        class_weights: as `masked_bce`; that of "none" is 1.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        assessed, targets = _assessed(logits, labels)
        shares = targets / targets.sum(dim=1, keepdim=True).clamp(min=1)
        # finite where an artifact takes no part: infinity would make its gradient nan
        open_logits = torch.where(assessed, logits, torch.finfo(logits.dtype).min)
        logs = torch.cat([torch.zeros_like(logits[:, :1]), open_logits], dim=1).log_softmax(dim=1)
        weighted = shares if class_weights is None else shares * class_weights.to(logits)
        present = torch.where(assessed, weighted * logs[:, 1:], 0.0).sum(dim=1)
        return -(present + (1 - shares.sum(dim=1)) * logs[:, 0])

    return loss


def cross_entropy_dice(
    *, alpha: float = 1.0, beta: float = 1.0, class_weights: Tensor | None = None
) -> PerSampleLoss:
    """The loss alpha * `cross_entropy` + beta * `soft_dice`; numbers as `bce_dice`."""
    return _with_dice(
        "cross_entropy_dice", cross_entropy(class_weights=class_weights), alpha=alpha, beta=beta
    )


def focal(*, gamma: float = 2.0, class_weights: Tensor | None = None) -> PerSampleLoss:
    """Focal loss: as `masked_bce`, each term times |t - p|^gamma, p = sigmoid(logits), which is (1 - p)^gamma
    where the artifact is present and p^gamma where it is absent.

    Args:
        gamma: 0, which is `masked_bce`, or 1 to 10: between, the gradient of a perfect answer is infinite.
        class_weights: as `masked_bce`.
    Raises:
        ConfigError: gamma is out of range.
    Reference: Lin et al., ICCV 2017; for severities Li et al., NeurIPS 2020, equation 4.
    """
    if not (gamma == 0 or 1 <= gamma <= MAX_GAMMA):
        raise ConfigError(f"focal: gamma = {gamma} must be 0, or 1 to {MAX_GAMMA:g}", code="bad-loss")

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        assessed, targets = _assessed(logits, labels)
        terms = _weighted_bce(logits, targets, class_weights)
        terms = terms * (targets - logits.sigmoid()).abs().pow(gamma)
        return torch.where(assessed, terms, 0.0).sum(dim=1) / assessed.sum(dim=1).clamp(min=1)

    return loss


def soft_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Soft Dice loss per sample over the artifact axis, 0 where no artifact is assessed.

    1 - (2 sum p t + s) / (sum p^2 + sum t^2 + s), p = sigmoid(logits), sums over that sample's assessed
    artifacts, s = 1.

    Args, Returns: as `masked_bce`.
    """
    assessed, targets = _assessed(logits, labels)
    probabilities = torch.where(assessed, logits.sigmoid(), 0.0)
    overlap = (probabilities * targets).sum(dim=1)
    size = probabilities.square().sum(dim=1) + targets.square().sum(dim=1)
    return 1 - (2 * overlap + DICE_SMOOTHING) / (size + DICE_SMOOTHING)


def bce_dice(*, alpha: float = 1.0, beta: float = 1.0, class_weights: Tensor | None = None) -> PerSampleLoss:
    """The loss alpha * `masked_bce` + beta * `soft_dice`; alpha and beta are public numbers, at least 0, not
    both 0.
    """
    return _with_dice("bce_dice", bce(class_weights=class_weights), alpha=alpha, beta=beta)


def _with_dice(name: str, entropy: PerSampleLoss, *, alpha: float, beta: float) -> PerSampleLoss:
    if not (alpha >= 0 and beta >= 0 and 0 < alpha + beta < float("inf")):
        raise ConfigError(
            f"{name}: alpha = {alpha}, beta = {beta} must be at least 0, finite, and not both 0",
            code="bad-loss",
        )
    return lambda logits, labels: alpha * entropy(logits, labels) + beta * soft_dice(logits, labels)


def batch_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """NOT PRIVATE. Dice loss over the batch, the same number for each sample, shape (B,).

    1 - (2 sum p t + s) / (sum p + sum t + s), sums over all that is assessed in the batch, s = 1e-5: the form
    of publications. Every sample's gradient depends on all others, so that clipping bounds no patient.

    Args: as `masked_bce`.
    """
    assessed, targets = _assessed(logits, labels)
    probabilities = torch.where(assessed, logits.sigmoid(), 0.0)
    overlap, size = (probabilities * targets).sum(), probabilities.sum() + targets.sum()
    dice = (2 * overlap + BATCH_DICE_SMOOTHING) / (size + BATCH_DICE_SMOOTHING)
    return (1 - dice).expand(len(logits))


MAKERS: dict[str, Callable[..., PerSampleLoss]] = {
    "bce": bce,
    "bce_dice": bce_dice,
    "cross_entropy": cross_entropy,
    "cross_entropy_dice": cross_entropy_dice,
    "focal": focal,
}
"""Those that take the keyword arguments of a plan: `training.loss_args`, `training.class_weights`."""

LOSSES: dict[str, PerSampleLoss] = {name: make() for name, make in MAKERS.items()} | {"dice": soft_dice}

BATCH_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "batch_dice": batch_dice,
}
"""Not private: one number for the whole batch. No private arm, and no control of one, may be trained beside
them.
"""


def loss_named(
    name: str,
    args: Mapping[str, Scalar] = NO_ARGUMENTS,
    class_weights: Mapping[str, Scalar] = NO_ARGUMENTS,
    *,
    private: bool = False,
    labels: Sequence[str] = DEFAULT_LABELS,
) -> PerSampleLoss:
    """The loss of that name.

    Args:
        args: its public numbers, `training.loss_args` of a plan.
        class_weights: artifact -> how much it counts where it is present; others 1. Public.
        private: whether it must be a function of each sample alone.
        labels: the outputs of the network.
    Raises:
        ConfigError: there is none (`unknown-loss`); it is `private` and the loss is not (`loss-not-private`);
            `bad-loss`. PlanError: `bad-loss-args`. The hint lists those there are.
    """
    if name not in LOSSES and name not in BATCH_LOSSES:
        known = ", ".join([*LOSSES, *BATCH_LOSSES])
        raise ConfigError(f"unknown loss {name!r}", code="unknown-loss", hint=f"known: {known}")
    if private and name not in LOSSES:
        raise ConfigError(
            f"the loss {name} is not private: it mixes patients, so that no clip bounds one",
            code="loss-not-private",
            hint=f"leave out the private arms and their controls, or use one of: {', '.join(LOSSES)}",
        )
    if not args and not class_weights:
        return LOSSES.get(name) or BATCH_LOSSES[name]
    if name not in MAKERS:
        raise PlanError(
            f"training.loss = {name} takes no loss_args and no class_weights",
            code="bad-loss-args",
            hint=f"those that do: {', '.join(MAKERS)}",
        )
    make = MAKERS[name]
    keywords = checked_arguments(args, make, where="training.loss_args", of=name, code="bad-loss-args")
    if class_weights:
        keywords["class_weights"] = torch.tensor([class_weights.get(one, 1.0) for one in labels])
    return make(**keywords)


def loss_of(
    training: Training, *, private: bool = False, labels: Sequence[str] = DEFAULT_LABELS
) -> PerSampleLoss:
    """The loss that a plan asks for, of a network with these outputs; raises as `loss_named`."""
    return loss_named(
        training.loss, training.loss_args, training.class_weights, private=private, labels=labels
    )


def _weighted_bce(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """One term an output, shape (B, A)."""
    weights = None if weights is None else weights.to(logits)
    return binary_cross_entropy_with_logits(logits, targets, reduction="none", pos_weight=weights)


def _assessed(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which outputs count, and targets with 0 where they do not."""
    if logits.ndim != 2 or logits.shape != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must both be (samples, artifacts)"
        )
    assessed = ~labels.isnan()
    return assessed, torch.where(assessed, labels, 0.0).to(logits.dtype)
