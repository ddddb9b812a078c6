"""The sentences of the gallery and the realism report, by key, in English and Chinese: see common/i18n.py."""

from __future__ import annotations

from common.artifacts import ARTIFACTS
from common.i18n import Languages, Say, speaker
from common.physics import SIMULATORS

ENGLISH: dict[str, str] = {
    "title": "Simulated artifacts on real slices",
    "local": (
        "It shows images of people: keep it where the images may be. It holds no path, name, UID, "
        "date or patient identifier."
    ),
    "lead": (
        "Each block is one real slice, first as it is, then with the artifact at rising severity (0 none, "
        "1 severe). Below each picture: what changed (signed difference), where (outline), and the "
        "parameters drawn. Click a picture to enlarge it, elsewhere to close."
    ),
    "lead.map": (
        "Each block is one slice of the site folders, as it is and with the artifacts of one version. With "
        "them: what changed (signed difference), where (outline), and the parameters drawn. Click a "
        "picture to enlarge it, elsewhere to close."
    ),
    "window.CT": "CT is shown from {low} to {high} HU",
    "window.MR": (
        "MR from the clean slice's 1st percentile to its brightest tissue, alike for clean and corrupted"
    ),
    "seed": "seed {seed}",
    "clean": "clean",
    "severity": "severity",
    "corrupted": "corrupted",
    "difference": "difference",
    "where": "where it changed",
    "changed": "{share} of the body",
    "unchanged": "no change here",
    "lower": "lower",
    "higher": "higher",
    "percent": "% of the shown range",
    "and": "{first} and {second}",
    "appearance": "A change of appearance, not an artifact of the vocabulary.",
    "slice": "{modality} slice {number}",
    # acceptance
    "acceptance": "What readers called realistic, of what they answered, with 95 % intervals (Wilson)",
    "readers": "readers with answers: {readers} of {of}; rows: {simulated} simulated, {untouched} untouched",
    "blank": "not filled in: {counts}",
    "untouched": "untouched slices",
    "all": "all severities",
    "mild": "up to 1/3",
    "moderate": "up to 2/3",
    "severe": "above 2/3",
    "reader": "reader {reader}",
    "unanimous": "all readers",
    "unanimous.note": (
        "all readers: rows that every reader answered, and the share that every reader called realistic"
    ),
    "nothing": "none",
    "kappa": "agreement, {who}: kappa {value} (95 % {low} to {high}; {n} rows, {patients} slices)",
    "undefined": "undefined",
    "named": "the artifact written down: {right} right, {wrong} another one, {unknown} in other words",
    "independent": (
        "Intervals assume independent rows; several rows show the same slice, so they are too narrow."
    ),
}

CHINESE: dict[str, str] = {
    "title": "真实切片上的模拟伪影",
    "local": "本页显示人体图像：请保存在允许存放这些图像的地方。页面不含路径、姓名、UID、日期或患者标识。",
    "lead": (
        "每一块为一张真实切片：先是原图，然后是严重程度逐渐升高的伪影（0 无，1 严重）。每张图下方依次为变化量（带符号的差值）、"
        "变化位置（轮廓）和抽取的参数。点击图片放大，点击别处关闭。"
    ),
    "lead.map": (
        "每一块为站点文件夹中的一张切片：原图，以及某一版本的伪影；随后依次为变化量（带符号的差值）、变化位置（轮廓）和抽取的参数。"
        "点击图片放大，点击别处关闭。"
    ),
    "window.CT": "CT 显示范围为 {low} 至 {high} HU",
    "window.MR": "MR 显示范围为原图的第 1 百分位至最亮组织，原图与模拟图相同",
    "seed": "随机种子 {seed}",
    "clean": "原图",
    "severity": "严重程度",
    "corrupted": "模拟图",
    "difference": "差值",
    "where": "变化位置",
    "changed": "体部的 {share}",
    "unchanged": "此处无变化",
    "lower": "降低",
    "higher": "升高",
    "percent": "%（占显示范围）",
    "and": "{first}与{second}",
    "appearance": "仅改变图像外观，不属于伪影词表。",
    "slice": "{modality} 切片 {number}",
    "acceptance": "阅片人判为真实的比例（占已作答者），附 95 % 区间（Wilson）",
    "readers": "已作答的阅片人：{readers} / {of}；行数：模拟 {simulated}，未处理 {untouched}",
    "blank": "未填写：{counts}",
    "untouched": "未处理的切片",
    "all": "全部严重程度",
    "mild": "不超过 1/3",
    "moderate": "不超过 2/3",
    "severe": "高于 2/3",
    "reader": "阅片人 {reader}",
    "unanimous": "全体阅片人",
    "unanimous.note": "全体阅片人：每人均已作答的行，以及其中每人均判为真实的比例",
    "nothing": "无",
    "kappa": "一致性，{who}：kappa {value}（95 % {low} 至 {high}；{n} 行，{patients} 张切片）",
    "undefined": "无定义",
    "named": "写下的伪影名称：正确 {right}，其他伪影 {wrong}，其他文字 {unknown}",
    "independent": "区间假定各行相互独立；若干行显示同一切片，因此区间偏窄。",
}

LANGUAGES: Languages = {"en": ENGLISH, "zh": CHINESE}

_CHINESE_DEFINITIONS = {
    "metal": "致密植入物引起的条纹和暗带：射束硬化、光子不足以及少数射线的噪声。",
    "beam_hardening": "多能射束沿路径硬化，在致密骨之间形成暗带和杯状伪影。",
    "motion": "k 空间各行采集之间的运动，在相位编码方向上形成重影、振铃和模糊。",
    "susceptibility": "磁化率突变处的信号缺失、堆积和几何变形。",
    "chemical_shift": "脂肪进动较慢，在脂肪与水的边界沿读出方向形成暗边和亮边。",
}
_ARTIFACTS = {artifact.name: artifact for artifact in ARTIFACTS}


def gallery_speaker(language: str) -> Say:
    """As `speaker`, for the gallery's sentences. Raises: ConfigError: `bad-argument`."""
    return speaker(language, LANGUAGES)


def title_of(name: str, language: str) -> str:
    """A simulator's name as a heading."""
    label = SIMULATORS[name].label
    if language == "zh" and label in _ARTIFACTS:
        return _ARTIFACTS[label].chinese
    return name.replace("_", " ")


def definition_of(name: str, language: str, say: Say) -> str:
    """What the simulator's artifact is."""
    label = SIMULATORS[name].label
    if label not in _ARTIFACTS:
        return say("appearance")
    return (
        _CHINESE_DEFINITIONS.get(label or "", _ARTIFACTS[label or ""].definition)
        if language == "zh"
        else _ARTIFACTS[label or ""].definition
    )
