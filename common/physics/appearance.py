"""Apply a hospital's appearance to every image, and set how often its patients have which artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """One hospital. Ranges are drawn from uniformly for every patient. All but the last group is independent
    of the labels.
    """

    name: str
    manufacturer: str
    model_name: str
    matrix: int = 128

    # MR
    mr_bodies: tuple[str, ...] = ("brain", "brain", "abdomen", "legs")
    mr_contrasts: tuple[str, ...] = ("T1",)
    mr_zoom: Range = (0.85, 1.0)
    """Body size relative to a field of view that it just fills."""
    gamma: Range = (0.95, 1.05)
    bias: Range = (0.1, 0.2)
    """Standard deviation of the log of the coil's sensitivity."""
    rolloff: Range = (0.0, 0.3)
    """Gaussian damping of k-space: exponent at its edge on each axis."""
    detail: Range = (0.0, 0.0)
    """Depth of texture at all scales, as a share of the signal."""
    truncation: Range = (1.0, 1.0)
    """Share of k-space kept on each axis: below 1 edges ring slightly."""
    noise_percent: Range = (1.5, 2.5)
    """Rician noise, % of the 99th percentile of the signal."""
    outline: Range = (0.0, 0.0)
    """Opposed-phase share: 1 makes every fat-water border black on all sides."""
    sequences: tuple[str, ...] = ("SE", "SE", "GRE")
    """"SE", "GRE" or "EPI"; decides what a disturbed field does."""
    phase_encoding: str = "COL"
    field_tesla: float = 1.5
    bandwidth_hz_per_px: float = 200.0
    echo_time_ms: float = 10.0
    mr_scale: float = 800.0
    """Stored signal of the 99th percentile."""

    # CT
    ct_bodies: tuple[str, ...] = ("head", "thorax", "abdomen", "pelvis")
    ct_zoom: Range = (0.85, 0.98)
    kernel: Range = (-0.2, 0.2)
    """Below 0 smooth, 0 neutral, above 0 edge-enhancing."""
    ct_noise_hu: Range = (6.0, 10.0)
    detail_hu: Range = (0.0, 0.0)
    """Depth of texture at all scales in soft tissue."""
    shading_hu: Range = (0.0, 4.0)
    """Smooth shading by scatter."""
    enhanced: float = 0.2
    """Share of patients with iodine."""
    dense_spots: int = 0
    """At most this many calcifications or spots of oral contrast a patient."""
    table: bool = True

    # both
    ct_share: float = 0.5
    """Share of patients that are CT; the others are MR."""
    oriented: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Chances of a patient to be upside down, mirrored, on the side."""
    nuisances: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Simulator without a label -> chance that a patient shows it, at severity 0.1-0.7."""

    # how a DICOM writer stores CT
    rescale_slope: float = 1.0
    rescale_intercept: float = -1024.0
    bits_stored: int = 12
    signed: bool = False

    # labels
    prevalence: Mapping[str, float] = field(
        default_factory=lambda: {
            "metal": 0.4,
            "beam_hardening": 0.4,
            "motion": 0.35,
            "susceptibility": 0.35,
            "chemical_shift": 0.35,
        },
        hash=False,
    )
    severity_range: Range = (0.4, 1.0)


SITE_APPEARANCES: tuple[Appearance, ...] = (
    Appearance(
        name="northgate",
        manufacturer="AURORA MEDICAL",
        model_name="Aurora One",
        mr_contrasts=("T1",),
        mr_bodies=("brain", "brain", "abdomen"),
        bias=(0.25, 0.4),
        gamma=(0.42, 0.55),
        rolloff=(0.0, 0.2),
        noise_percent=(3.0, 4.5),
        phase_encoding="ROW",
        field_tesla=1.5,
        mr_zoom=(0.48, 0.65),
        detail=(0.7, 1.1),
        detail_hu=(60.0, 90.0),
        ct_zoom=(0.42, 0.58),
        oriented=(0.5, 0.5, 0.4),
        truncation=(0.85, 1.0),
        kernel=(1.0, 1.4),
        ct_noise_hu=(24.0, 34.0),
        ct_bodies=("head", "head", "thorax", "pelvis"),
        dense_spots=5,
        prevalence={
            "metal": 0.5,
            "beam_hardening": 0.35,
            "motion": 0.45,
            "susceptibility": 0.3,
            "chemical_shift": 0.3,
        },
    ),
    Appearance(
        name="harbour",
        manufacturer="BOREALIS IMAGING",
        model_name="B3T Wide",
        mr_contrasts=("T2",),
        mr_bodies=("brain", "abdomen", "legs"),
        gamma=(0.38, 0.5),
        bias=(0.3, 0.45),
        rolloff=(0.1, 0.4),
        noise_percent=(2.0, 4.0),
        phase_encoding="ROW",
        field_tesla=3.0,
        bandwidth_hz_per_px=330.0,
        mr_scale=2400.0,
        mr_zoom=(0.45, 0.6),
        detail=(0.8, 1.2),
        detail_hu=(70.0, 100.0),
        ct_zoom=(0.4, 0.55),
        oriented=(0.5, 0.5, 0.4),
        truncation=(0.85, 1.0),
        kernel=(1.2, 1.6),
        ct_noise_hu=(26.0, 38.0),
        ct_bodies=("thorax", "abdomen", "pelvis"),
        enhanced=0.8,
        dense_spots=6,
        table=False,
        rescale_intercept=0.0,
        bits_stored=16,
        signed=True,
        prevalence={
            "metal": 0.3,
            "beam_hardening": 0.5,
            "motion": 0.3,
            "susceptibility": 0.45,
            "chemical_shift": 0.35,
        },
    ),
    Appearance(
        name="valley",
        manufacturer="CYGNUS HEALTH",
        model_name="C-150",
        mr_contrasts=("PD", "FLAIR"),
        mr_bodies=("brain", "legs", "legs"),
        mr_zoom=(0.45, 0.6),
        gamma=(0.35, 0.46),
        bias=(0.2, 0.4),
        rolloff=(0.0, 0.3),
        truncation=(0.85, 1.0),
        noise_percent=(4.0, 6.0),
        outline=(0.0, 0.2),
        phase_encoding="COL",
        field_tesla=1.5,
        bandwidth_hz_per_px=130.0,
        mr_scale=300.0,
        detail=(0.9, 1.3),
        detail_hu=(60.0, 100.0),
        oriented=(0.5, 0.5, 0.4),
        kernel=(1.1, 1.5),
        ct_noise_hu=(28.0, 40.0),
        ct_zoom=(0.4, 0.55),
        ct_bodies=("head", "abdomen", "pelvis"),
        shading_hu=(15.0, 30.0),
        enhanced=0.1,
        dense_spots=6,
        rescale_intercept=-1000.0,
        bits_stored=16,
        prevalence={
            "metal": 0.4,
            "beam_hardening": 0.4,
            "motion": 0.35,
            "susceptibility": 0.3,
            "chemical_shift": 0.5,
        },
    ),
    Appearance(
        name="island",
        manufacturer="DRACO SYSTEMS",
        model_name="Draco X",
        matrix=160,
        mr_contrasts=("T2", "FLAIR"),
        mr_bodies=("brain", "abdomen", "legs"),
        mr_zoom=(0.45, 0.65),
        gamma=(0.3, 0.42),
        bias=(0.4, 0.55),
        rolloff=(0.0, 0.4),
        truncation=(0.85, 1.0),
        noise_percent=(5.0, 8.0),
        outline=(0.0, 0.2),
        phase_encoding="ROW",
        field_tesla=3.0,
        mr_scale=1500.0,
        detail=(0.9, 1.4),
        detail_hu=(70.0, 110.0),
        oriented=(0.5, 0.5, 0.4),
        kernel=(1.2, 1.7),
        ct_noise_hu=(30.0, 42.0),
        ct_zoom=(0.4, 0.58),
        shading_hu=(5.0, 20.0),
        enhanced=0.5,
        dense_spots=5,
        rescale_slope=0.5,
        bits_stored=16,
    ),
)
"""Three hospitals that train, and a fourth, outside the range of the others, that is never seen."""

PREVALENCE = {
    "metal": 0.4,
    "beam_hardening": 0.4,
    "motion": 0.4,
    "susceptibility": 0.4,
    "chemical_shift": 0.4,
}

_SPIN_ECHO = Appearance(
    name="public_a",
    manufacturer="OPEN ARCHIVE",
    model_name="Collection A",
    mr_bodies=("brain", "brain", "skull_base", "head_sagittal", "spine", "knee"),
    mr_contrasts=("T1", "T2", "PD", "ANY"),
    mr_zoom=(0.7, 1.0),
    detail=(0.02, 0.25),
    detail_hu=(0.0, 20.0),
    gamma=(0.85, 1.2),
    bias=(0.0, 0.3),
    rolloff=(0.0, 0.6),
    truncation=(0.92, 1.0),
    noise_percent=(0.5, 4.0),
    phase_encoding="ROW",
    kernel=(-0.3, 0.3),
    ct_noise_hu=(2.0, 12.0),
    ct_zoom=(0.7, 1.12),
    ct_bodies=("head", "thorax", "thorax", "abdomen", "spine"),
    enhanced=0.5,
    dense_spots=2,
    ct_share=0.4,
    oriented=(0.15, 0.5, 0.1),
    nuisances={"photon_starvation": 0.12, "ring": 0.08, "ct_motion": 0.08, "gibbs": 0.12, "bias_field": 0.25},
    prevalence=PREVALENCE,
    severity_range=(0.35, 1.0),
)
_GRADIENT_ECHO = replace(
    _SPIN_ECHO,
    name="public_b",
    model_name="Collection B",
    mr_bodies=("abdomen", "chest", "chest", "legs", "head_sagittal", "spine"),
    mr_contrasts=("GRE", "T1", "T2", "ANY"),
    sequences=("GRE", "SE"),
    bias=(0.1, 0.38),
    field_tesla=3.0,
    echo_time_ms=6.0,
    kernel=(-0.7, -0.1),
    ct_noise_hu=(3.0, 20.0),
    ct_bodies=("thorax", "abdomen", "pelvis", "knee", "shoulder"),
    table=False,
)
_EPI = replace(
    _SPIN_ECHO,
    name="public_c",
    model_name="Collection C",
    mr_bodies=("brain_only",),
    mr_contrasts=("EPI", "DWI", "ANY_EPI"),
    mr_zoom=(0.65, 0.95),
    rolloff=(0.0, 0.8),
    truncation=(0.42, 0.65),
    noise_percent=(0.5, 4.5),
    phase_encoding="COL",
    field_tesla=3.0,
    echo_time_ms=30.0,
    kernel=(0.0, 0.45),
    ct_noise_hu=(4.0, 18.0),
    ct_bodies=("head", "thorax", "qa_phantom", "abdomen", "spine"),
)

PUBLIC_APPEARANCES: tuple[Appearance, ...] = (
    _SPIN_ECHO,
    _GRADIENT_ECHO,
    _EPI,
    replace(
        _SPIN_ECHO,
        name="public_d",
        model_name="Collection D",
        phase_encoding="COL",
        field_tesla=3.0,
        bandwidth_hz_per_px=300.0,
    ),
    replace(
        _GRADIENT_ECHO, name="public_e", model_name="Collection E", phase_encoding="COL", field_tesla=1.5
    ),
    replace(_EPI, name="public_f", model_name="Collection F", truncation=(0.65, 1.0)),
)
"""What anybody may invent: all bodies and contrasts, broad ranges, and the fourth hospital's noise, gamma and
kernel outside them.
"""
