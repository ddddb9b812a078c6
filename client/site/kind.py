"""Admit a site that says it is no hospital: its kind takes away the noise, the least cell and the ledger."""

from __future__ import annotations

import functools
from pathlib import Path

from client.dicom.provenance import is_generated
from client.site.config import SiteConfig
from common.errors import RefusedError


def admit_kind(site: SiteConfig, folder: Path, *, again: bool = False) -> str:
    """Admit a hospital, images that fedqc generated, or images of which an operator declared that they are no
    hospital's patients.

    The images are looked at once a process: an agent does it when it starts, so that no task opens a file
    before it is verified.

    Args:
        again: look at the images again, as they are now.
    Returns:
        what admits a site that is no hospital, for the operator's log; "" for a hospital, or where there are
        no images.
    Raises:
        RefusedError: `kind-undeclared`; the public reason is a function of site.yaml and of the program that
            wrote the files.
    """
    if site.kind == "hospital":
        return ""
    declared = site.declared_not_hospital
    if declared is not None and is_declared(site):
        return f"declared on {declared.at} by {declared.by}: {declared.why}"
    if again:
        _generated.cache_clear()
    generated = _generated(folder / site.images)
    if generated is None:
        return ""  # nothing to protect; reading the images will report that there are none
    if generated:
        return "its images were written by fedqc"
    raise RefusedError(
        f"{folder / 'site.yaml'}: kind: {site.kind}, and no operator has declared that the images in "
        f"{site.images} are no hospital's patients",
        code="kind-undeclared",
        public_reason="this site says that it is no hospital, and its operator has not declared so",
        hint="kind: hospital; or, if these are no hospital's patients: fedqc site declare WHY",
    )


def is_declared(site: SiteConfig) -> bool:
    """Whether a site says that it is no hospital, and an operator declared so for its present images."""
    declared = site.declared_not_hospital
    return site.kind != "hospital" and declared is not None and declared.images == site.images


@functools.lru_cache(maxsize=256)
def _generated(images: Path) -> bool | None:
    return is_generated(images)
