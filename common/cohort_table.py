"""Lay out what describes a cohort: Table 1 by part, and the flow from files found to patients scored.

A site computes it of its own patients (client/data_check/cohort_table.py). A run folder holds it only of
simulated sites of kind public or synthetic. Both pages lay it out with the same rows and words.
References: STARD 2015 (item 19, participant flow), TRIPOD+AI 2024 (item 20, participants).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from common.artifacts import ARTIFACTS
from common.errors import ConfigError
from common.i18n import Say
from common.names import ONE_LINE, SITE_NAME
from common.strict import describe_validation

_STRICT = with_config(ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
_Count = Annotated[int, Field(ge=0, le=10**12)]
_Number = Annotated[float, Field(ge=0, le=1e6)] | None
_Word = Annotated[str, Field(min_length=1, max_length=80, pattern=ONE_LINE)]
Counts = dict[_Word, _Count]

NOT_STATED, OTHER = "not stated", "other"
MAX_WORDS = 8
"""Values of a field that are shown; rarer ones are added up."""
OF_STUDIES = ("modality", "vendor", "field_strength_t", "kvp", "body_part")
_IN_CHINESE = {artifact.name: artifact.chinese for artifact in ARTIFACTS}
UNITS = {"field_strength_t": " T", "kvp": " kV"}


@_STRICT
class Quartiles(TypedDict):
    """Median and quartiles; null of no value."""

    n: _Count
    median: _Number
    q1: _Number
    q3: _Number


@_STRICT
class ArtifactCounts(TypedDict):
    """Patients of whom a slice was assessed, those with the artifact in a slice, and the severity (0 to 1)
    of the worst slice of each of these, where it is stated.
    """

    assessed: _Count
    present: _Count
    severity: Quartiles


@_STRICT
class Column(TypedDict):
    """One column of Table 1. A study with two values of a field counts once for each."""

    patients: _Count
    studies: _Count
    slices: _Count
    age_years: Quartiles  # of patients, at the first study
    sex: Counts  # of patients: female, male, not stated
    modality: Counts  # of studies, as are the four below
    vendor: Counts
    field_strength_t: Counts
    kvp: Counts
    body_part: Counts
    artifacts: dict[_Word, ArtifactCounts]


@_STRICT
class FileStep(TypedDict):
    """What was left after a step, and why files, or slices of files that are used, were lost in it."""

    step: _Word
    files: _Count
    slices: _Count
    patients: _Count
    lost: Counts  # code -> files
    lost_slices: Counts


@_STRICT
class PartFlow(TypedDict):
    """The patients of a part."""

    patients: _Count
    slices: _Count
    unlabelled: _Count  # without a label of any artifact
    disputed: _Count  # without one because readers differ, and nobody has decided
    labelled: _Count


@_STRICT
class CohortTable(TypedDict):
    """A cohort."""

    site: Annotated[str, Field(pattern=SITE_NAME)]
    columns: dict[_Word, Column]  # "all", and the parts that have patients
    files: list[FileStep]
    left_out: _Count  # patients of no part: opted out since, or in an earlier cohort of another budget
    parts: dict[_Word, PartFlow]  # empty where patients are in no part
    scored: _Word  # the part whose labelled patients are scored, or "all"


_TABLES: TypeAdapter[dict[str, CohortTable]] = TypeAdapter(dict[str, CohortTable])


def checked_tables(values: object, where: str) -> dict[str, CohortTable]:
    """The same values, once they are tables of cohorts by site.

    Raises:
        ConfigError: a value is wrong (code `damaged-run`). One line.
    """
    try:
        return _TABLES.validate_python(values)
    except ValidationError as error:
        raise ConfigError(
            f"{where}: {describe_validation(error)}",
            code="damaged-run",
            hint="restore the run folder as fedqc wrote it",
        ) from None


def num_scored(table: CohortTable) -> int:
    """Patients who are scored: those with a label, of the test part or of all parts."""
    parts = table["parts"]
    return sum(flow["labelled"] for part, flow in parts.items() if table["scored"] in ("all", part))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table: `group` heads rows that belong together."""

    group: str
    label: str
    cells: tuple[str, ...]


def table_rows(columns: Sequence[Column], say: Say, *, chinese: bool = False) -> list[Row]:
    """Table 1, a cell a column.

    Args:
        chinese: say the artifacts in Chinese.
    """
    rows: list[Row] = []

    def add(group: str, label: str, cells: Iterable[str]) -> None:
        rows.append(Row(group=say(f"cohort.table.{group}"), label=label, cells=tuple(cells)))

    add("size", say("cohort.table.patients"), (str(one["patients"]) for one in columns))
    add("size", say("cohort.table.studies"), (str(one["studies"]) for one in columns))
    add("size", say("cohort.table.slices"), (str(one["slices"]) for one in columns))
    add("age", say("cohort.table.median"), (_spread(one["age_years"], 0) for one in columns))
    without = [_share(one["patients"] - one["age_years"]["n"], one["patients"]) for one in columns]
    add("age", say(f"cohort.value.{NOT_STATED}"), without)
    for field in ("sex", *OF_STUDIES):
        sizes = [one["patients" if field == "sex" else "studies"] for one in columns]
        counts = [cast(Mapping[str, Mapping[str, int]], one)[field] for one in columns]
        shown = _shown(counts)
        for word in shown:
            found = (_count(one, word, shown) for one in counts)
            add(field, _value(word, field, say), map(_share, found, sizes))
    names = dict.fromkeys(name for one in columns for name in one["artifacts"])
    artifacts = {name: [one["artifacts"].get(name) for one in columns] for name in names}
    titles = {name: _IN_CHINESE.get(name, name) if chinese else name for name in names}
    for name, cells in artifacts.items():
        add("artifacts", titles[name], map(_prevalence, cells))
    for name, cells in artifacts.items():
        if any(cell and cell["severity"]["n"] for cell in cells):
            add("severity", titles[name], map(_severity, cells))
    return rows


def flow_rows(tables: Sequence[CohortTable], say: Say) -> list[Row]:
    """The flow, a cell a cohort: from files to the patients who are scored."""
    rows: list[Row] = []

    def add(group: str, label: str, cells: Iterable[object]) -> None:
        rows.append(Row(group=say(f"cohort.flow.{group}"), label=label, cells=tuple(map(str, cells))))

    by_step = [{step["step"]: step for step in table["files"]} for table in tables]
    for name in dict.fromkeys(name for steps in by_step for name in steps):
        found = [steps.get(name, _NO_STEP) for steps in by_step]
        add("files", say(f"cohort.flow.step.{name}"), (step["files"] for step in found))
        for code in sorted({code for step in found for code in step["lost"]}):
            lost = (_lost(step["lost"].get(code, 0)) for step in found)
            add("files", say("cohort.flow.lost", code=code), lost)
    add("patients", say("cohort.flow.step.used"), (steps["used"]["patients"] for steps in by_step))
    if any(table["left_out"] for table in tables):
        add("patients", say("cohort.flow.left_out"), (_lost(table["left_out"]) for table in tables))
    for part in dict.fromkeys(part for table in tables for part in table["parts"]):
        flows = [cast(Mapping[str, int], table["parts"].get(part, {})) for table in tables]
        for what in ("patients", "unlabelled", "disputed", "labelled"):
            counts = [flow.get(what, 0) for flow in flows]
            label = say(f"cohort.flow.part.{what}", part=say(f"cohort.column.{part}"))
            if what in ("patients", "labelled"):
                add("patients", label, counts)
            elif any(counts):
                add("patients", label, map(_lost, counts))
    add("patients", say("cohort.flow.scored"), map(num_scored, tables))
    return rows


_NO_STEP = FileStep(step="none", files=0, slices=0, patients=0, lost={}, lost_slices={})


def _lost(count: int) -> str:
    return f"−{count}" if count else "0"


def _shown(counts: Sequence[Mapping[str, int]]) -> list[str]:
    """The values of a field, the most common first, what is not stated last; rare ones are added to OTHER."""
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    named = [word for word, _ in sorted(total.items(), key=lambda pair: (-pair[1], pair[0]))]
    named = [word for word in named if word not in (NOT_STATED, OTHER)]
    rest = [OTHER] if OTHER in total or len(named) > MAX_WORDS else []
    return named[:MAX_WORDS] + rest + ([NOT_STATED] if NOT_STATED in total else [])


def _count(counts: Mapping[str, int], word: str, shown: Sequence[str]) -> int:
    if word != OTHER:
        return counts.get(word, 0)
    return sum(count for name, count in counts.items() if name == OTHER or name not in shown)


def _value(word: str, field: str, say: Say) -> str:
    if word in (NOT_STATED, OTHER) or field == "sex":
        return say(f"cohort.value.{word}")
    return word + UNITS.get(field, "")


def _share(count: int, of: int) -> str:
    return f"{count} ({100 * count / of:.0f} %)" if of else "0"


def _spread(found: Quartiles, decimals: int) -> str:
    if found["median"] is None or found["q1"] is None or found["q3"] is None:
        return "–"
    median, q1, q3 = (f"{found[name]:.{decimals}f}" for name in ("median", "q1", "q3"))
    return f"{median} [{q1}–{q3}]"


def _prevalence(found: ArtifactCounts | None) -> str:
    if found is None or not found["assessed"]:
        return "–"
    return f"{found['present']} / {found['assessed']} ({100 * found['present'] / found['assessed']:.0f} %)"


def _severity(found: ArtifactCounts | None) -> str:
    if found is None or not found["severity"]["n"]:
        return "–"
    return f"{_spread(found['severity'], 2)}, n {found['severity']['n']}"


# words of every page that shows a cohort

ENGLISH: dict[str, str] = {
    "cohort.table.title": "Table 1: who is in the cohort",
    "cohort.table.size": "Size",
    "cohort.table.patients": "patients",
    "cohort.table.studies": "studies",
    "cohort.table.slices": "images (slices)",
    "cohort.table.age": "Age in years, patients at their first study",
    "cohort.table.median": "median [quartiles]",
    "cohort.table.sex": "Sex, patients",
    "cohort.table.modality": "Modality, studies",
    "cohort.table.vendor": "Vendor, studies",
    "cohort.table.field_strength_t": "Field strength, studies",
    "cohort.table.kvp": "Tube voltage, studies",
    "cohort.table.body_part": "Body part, studies",
    "cohort.table.artifacts": "Patients with the artifact / assessed",
    "cohort.table.severity": "Severity of the worst slice (0 to 1), median [quartiles]",
    "cohort.table.note": "A study with two values of a field counts once for each. A patient has an artifact "
    "who shows it in a slice; assessed are patients of whom a slice has a label. Header texts that are no "
    "known words count as other.",
    "cohort.column.all": "all",
    "cohort.column.train": "training",
    "cohort.column.validation": "validation",
    "cohort.column.test": "test",
    "cohort.value.not stated": "not stated",
    "cohort.value.other": "other",
    "cohort.value.female": "female",
    "cohort.value.male": "male",
    "cohort.flow.title": "Flow: from the files found to the patients scored",
    "cohort.flow.files": "Files",
    "cohort.flow.patients": "Patients",
    "cohort.flow.step.found": "found",
    "cohort.flow.step.readable": "readable",
    "cohort.flow.step.in the cohort": "in the cohort",
    "cohort.flow.step.used": "used",
    "cohort.flow.lost": "left out: {code}",
    "cohort.flow.left_out": "left out: opted out since, or in an earlier cohort",
    "cohort.flow.part.patients": "{part}",
    "cohort.flow.part.unlabelled": "{part}: without a label",
    "cohort.flow.part.disputed": "{part}: readers differ, undecided",
    "cohort.flow.part.labelled": "{part}: with a label",
    "cohort.flow.scored": "scored",
    "cohort.flow.unlabelled": "without a label: {count}",
    "cohort.flow.disputed": "readers differ: {count}",
    "cohort.flow.labelled": "with a label: {count}",
    "cohort.flow.box": "{files} files",
    "cohort.flow.under": "{slices} slices, {patients} patients",
    "cohort.flow.part_box": "{patients} patients",
    "cohort.flow.part_under": "{slices} slices",
    "cohort.flow.slices_of": "({count} slices: {code})",
}

CHINESE: dict[str, str] = {
    "cohort.table.title": "表 1：队列构成",
    "cohort.table.size": "规模",
    "cohort.table.patients": "患者",
    "cohort.table.studies": "检查",
    "cohort.table.slices": "图像（切片）",
    "cohort.table.age": "年龄（岁），患者首次检查时",
    "cohort.table.median": "中位数 [四分位数]",
    "cohort.table.sex": "性别，患者",
    "cohort.table.modality": "模态，检查",
    "cohort.table.vendor": "厂商，检查",
    "cohort.table.field_strength_t": "场强，检查",
    "cohort.table.kvp": "管电压，检查",
    "cohort.table.body_part": "部位，检查",
    "cohort.table.artifacts": "有该伪影的患者 / 已评估的患者",
    "cohort.table.severity": "最严重切片的程度（0 至 1），中位数 [四分位数]",
    "cohort.table.note": "某字段有两个值的检查在两个值下各计一次。任一切片有该伪影的患者即计为有；"
    "至少一张切片有标签的患者计为已评估。不属于已知词汇的头文件文字计为其他。",
    "cohort.column.all": "全部",
    "cohort.column.train": "训练",
    "cohort.column.validation": "验证",
    "cohort.column.test": "测试",
    "cohort.value.not stated": "未注明",
    "cohort.value.other": "其他",
    "cohort.value.female": "女",
    "cohort.value.male": "男",
    "cohort.flow.title": "流程：从找到的文件到评分的患者",
    "cohort.flow.files": "文件",
    "cohort.flow.patients": "患者",
    "cohort.flow.step.found": "找到",
    "cohort.flow.step.readable": "可读取",
    "cohort.flow.step.in the cohort": "符合队列规则",
    "cohort.flow.step.used": "使用",
    "cohort.flow.lost": "排除：{code}",
    "cohort.flow.left_out": "排除：之后退出，或已在较早的队列中",
    "cohort.flow.part.patients": "{part}",
    "cohort.flow.part.unlabelled": "{part}：无标签",
    "cohort.flow.part.disputed": "{part}：读片者意见不一，未裁定",
    "cohort.flow.part.labelled": "{part}：有标签",
    "cohort.flow.scored": "评分",
    "cohort.flow.unlabelled": "无标签：{count}",
    "cohort.flow.disputed": "意见不一：{count}",
    "cohort.flow.labelled": "有标签：{count}",
    "cohort.flow.box": "{files} 个文件",
    "cohort.flow.under": "{slices} 张切片，{patients} 名患者",
    "cohort.flow.part_box": "{patients} 名患者",
    "cohort.flow.part_under": "{slices} 张切片",
    "cohort.flow.slices_of": "（{count} 张切片：{code}）",
}
