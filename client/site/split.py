"""Decide which split of its patients a site uses, and keep it from its first use on.

The shares stand in site.yaml (`split`). They are written to the state folder when a run first uses them, and
a later edit is refused: a patient who was tested on must never train. A plan's split serves simulations, and
sites whose site.yaml has none; a plan that asks for another split than the site's is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from client.site.config import SiteConfig
from common.errors import ConfigError, RefusedError, RunError
from common.files import write_as_owner
from common.plan import Split

SPLIT = "split.json"
Shares = tuple[float, float, float]
"""Of the patients: train, validation, test."""


@dataclass(frozen=True, kw_only=True)
class SiteSplit:
    """The shares that a run uses at a site, and where they come from."""

    shares: Shares
    origin: Literal["site.yaml", "first run", "plan", "default"]

    def __str__(self) -> str:
        return f"{shares_text(self.shares)} ({self.origin})"


def split_of_site(site: SiteConfig, folder: Path, plan: Split | None = None) -> SiteSplit:
    """The split that a run of `plan` would use at this site. Changes nothing.

    Args:
        folder: that of site.yaml.
        plan: the plan's split; its default asks for nothing. None: no plan.
    Raises:
        ConfigError: `split-fixed` (site.yaml has another split than that of the first run), `bad-split` (the
            file in the state folder is damaged).
        RefusedError: `split-differs` (the plan asks for another split than the site's).
    """
    own = None if site.split is None else _shares(site.split)
    fixed = _fixed(folder / site.state / SPLIT)
    if own is not None and fixed is not None and own != fixed:
        raise ConfigError(
            f"{folder / 'site.yaml'}: split is {shares_text(own)}, the first run used {shares_text(fixed)}",
            code="split-fixed",
            hint=f"restore split: {_yaml(fixed)}: a patient who was tested on must never train; for another "
            "split, make a new site with other patients",
        )
    bound = own or fixed
    wanted = None if plan is None else _shares(plan)
    if bound is None:
        return SiteSplit(shares=wanted or _shares(Split()), origin="plan" if wanted else "default")
    if wanted is not None and wanted not in (bound, _shares(Split())):
        raise RefusedError(
            f"{site.name}: the plan asks for split {shares_text(wanted)}, the site's is {shares_text(bound)}",
            code="split-differs",
            hint="leave split out of the plan: each site has its own in site.yaml",
            public_reason=f"the plan's split is not this site's ({shares_text(bound)})",
        )
    return SiteSplit(shares=bound, origin="first run" if own is None else "site.yaml")


def fix_split(site: SiteConfig, folder: Path, split: SiteSplit, *, always: bool = False) -> None:
    """Keep the split of a run that is about to begin, once and for all.

    The plan's split is kept only where the site has joined a federation: a simulation may try several.

    Args:
        always: keep it in a simulation, too: a hospital's patients are about to be scored.
    Raises:
        RunError: it cannot be written (code `not-writable`); as where the ledger meets a full disk, nothing
            of a patient decides that.
    """
    state = folder / site.state
    is_bound = always or split.origin == "site.yaml" or (state / "coordinator.json").is_file()
    if is_bound and not (state / SPLIT).exists():
        train, validation, test = split.shares
        values = {
            "train": train,
            "validation": validation,
            "test": test,
            "from": split.origin,
            "at": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        try:
            write_as_owner(state / SPLIT, json.dumps(values).encode())
        except OSError as error:
            raise RunError(
                f"{state / SPLIT}: cannot be written ({error.strerror})", code="not-writable"
            ) from error


def shares_text(shares: Shares) -> str:
    """`train 0.7, test 0.3`."""
    named = zip(("train", "validation", "test"), shares, strict=True)
    return ", ".join(f"{name} {share:g}" for name, share in named if share)


def _yaml(shares: Shares) -> str:
    return "{" + re.sub(r"([a-z]) ", r"\1: ", shares_text(shares)) + "}"


def _shares(split: Split) -> Shares:
    return split.train, split.validation, split.test


def _fixed(path: Path) -> Shares | None:
    try:
        values = json.loads(path.read_text(encoding="ascii"))
        return _shares(Split.model_validate({name: values[name] for name in Split.model_fields}))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror})", code="bad-split", hint="run as the agent's user"
        ) from None
    except (ValueError, KeyError, TypeError, ValidationError):
        raise ConfigError(f"{path}: damaged", code="bad-split", hint="restore it from the backup") from None
