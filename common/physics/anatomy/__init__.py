"""Anatomy-like phantoms: a few adjacent slices of one invented patient, as HU (CT) or signal and fat share
(MR).

Ellipses and other outlines with anti-aliased edges on a smoothly warped grid, band-limited textures, random
lesions. Nothing here knows about artifacts.
"""

from collections.abc import Callable

from common.physics.anatomy.ct import CT_BODIES, add_dense_spots, add_table
from common.physics.anatomy.mr_body import abdomen_mr, chest_mr, knee_mr, legs_mr, spine_mr
from common.physics.anatomy.mr_head import brain_mr, brain_only_mr, head_sagittal_mr, skull_base_mr
from common.physics.anatomy.scene import Scene
from common.physics.anatomy.tissue import CONTRASTS, MrAnatomy

__all__ = [
    "CONTRASTS",
    "CT_BODIES",
    "FAT_SUPPRESSED",
    "FIELD_OF_VIEW_MM",
    "MR_BODIES",
    "MrAnatomy",
    "Scene",
    "add_dense_spots",
    "add_table",
]

MR_BODIES: dict[str, Callable[[Scene, str], MrAnatomy]] = {
    "brain": brain_mr,
    "abdomen": abdomen_mr,
    "legs": legs_mr,
    "brain_only": brain_only_mr,
    "skull_base": skull_base_mr,
    "head_sagittal": head_sagittal_mr,
    "chest": chest_mr,
    "spine": spine_mr,
    "knee": knee_mr,
}

FAT_SUPPRESSED = ("EPI", "DWI", "ANY_EPI")
"""Contrasts in which fat is dark, and which are taken by EPI."""

FIELD_OF_VIEW_MM = {
    "head": 250.0,
    "brain": 240.0,
    "thorax": 400.0,
    "abdomen": 400.0,
    "pelvis": 400.0,
    "legs": 380.0,
    "brain_only": 230.0,
    "skull_base": 230.0,
    "head_sagittal": 250.0,
    "chest": 400.0,
    "spine": 220.0,
    "knee": 220.0,
    "shoulder": 500.0,
    "qa_phantom": 250.0,
}
"""Of an image, by body; a body that exists in CT and in MR has one."""
