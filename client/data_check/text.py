"""Print the data check on a terminal: verdict and findings first, then the numbers."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from client.data_check.check import Readiness
from client.data_check.profile import ACQUISITION, MEASURES, Numbers, Population
from client.data_check.vocabulary import MISSING
from client.labels.spreadsheet import SheetProblem
from common.cohort_table import flow_rows, table_rows
from common.i18n import Say, counted

SHOWN = 8  # file or row numbers, words of a field
SHOWN_PROBLEMS = 40


def report_text(found: Readiness, say: Say) -> str:
    """All sections, with empty lines between them."""
    sections = [
        _verdict(found, say),
        _problems(found.problems, say),
        _flow(found, say),
        _cohort(found, say),
        _labels(found, say),
        _acquisition(found, say),
        _time(found, say),
        _drift(found, say),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def finding_text(code: str, values: dict[str, Any], say: Say) -> str:
    """One finding in words. A measure is said in the report's language."""
    words = values | {"measure": say(values["measure"])} if "measure" in values else values
    return say(f"{code}.found", **words)


def patients_text(found: Readiness, say: Say) -> str:
    """How many patients, and how many of them a run leaves out because they are in an earlier cohort."""
    said = counted(say, found.intake.patients, "patients")
    return said + say("in-earlier-cohort", count=found.intake.left_out) if found.intake.left_out else said


def left_out(found: Readiness, say: Say) -> list[tuple[str, int, str, str]]:
    """What of the files is not used: kind, count, code, file numbers."""
    intake = found.subject.slices.intake
    rows = []
    for kind, problems in (("quarantine", intake.quarantined), ("exclusion", intake.excluded)):
        for code, count in Counter(problem.code for problem in problems).most_common():
            numbers = [problem.number for problem in problems if problem.code == code]
            rows.append((say(kind), count, code, some(numbers)))
    if intake.duplicates:
        rows.append((say("duplicate"), len(intake.duplicates), "", some(intake.duplicates)))
    rows += [(say("slice-rule"), count, code, "") for code, count in sorted(intake.excluded_slices.items())]
    return rows


def some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:SHOWN])) + (", …" if len(numbers) > SHOWN else "")


def span_text(numbers: Numbers, say: Say) -> str:
    """Median and percentiles of a number over patients."""
    if numbers.median != numbers.median:
        return say("none")
    said = f"{numbers.median:.4g} ({numbers.low:.4g} – {numbers.high:.4g})"
    return f"{said}; {say('missing', count=f'{numbers.missing:.0f}')}" if round(numbers.missing) else said


def slices_text(span: tuple[int, float, int] | None, say: Say) -> str:
    """Median, least and most slices of a patient."""
    return say("none") if span is None else f"{span[1]:g} ({span[0]} – {span[2]})"


def words_text(counts: dict[str, float], patients: int, say: Say) -> str:
    """The most common words of a field with the share of patients."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    said = ", ".join(f"{name} {percent(count / patients)}" for name, count in ordered[:SHOWN])
    return translated(said, say) + (f", … ({len(ordered)})" if len(ordered) > SHOWN else "")


def translated(said: str, say: Say) -> str:
    """What a profile says, with its one word that is not a name in the report's language."""
    return said.replace(MISSING, say("none"))


def percent(share: float) -> str:
    """Rounded half up: equal shares look equal."""
    return f"{int(share * 100 + 0.5 + 1e-9)}%"


def field_rows(population: Population, fields: Iterable[str], say: Say) -> list[tuple[str, str]]:
    rows = []
    for field in fields:
        if field in population.words:
            rows.append((say(field), words_text(population.words[field], population.patients, say)))
        elif field in population.numbers:
            rows.append((say(field), span_text(population.numbers[field], say)))
    return rows


def table(rows: Sequence[Sequence[object]], indent: str = "  ") -> list[str]:
    """Rows as aligned columns; numbers to the right. Chinese characters take two columns."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(_width, column)) for column in zip(*texts, strict=True)]
    lines = []
    for row, cells in zip(rows, texts, strict=True):
        parts = []
        for value, cell, width in zip(row, cells, widths, strict=True):
            gap = " " * (width - _width(cell))
            parts.append(gap + cell if isinstance(value, int | float) else cell + gap)
        lines.append((indent + "  ".join(parts)).rstrip())
    return lines


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _verdict(found: Readiness, say: Say) -> list[str]:
    intake = found.subject.slices.intake
    site = found.subject.site
    lines = [
        f"{site.name if site else say('folder')}: {say(found.verdict).upper()}",
        f"{counted(say, intake.found, 'files')}: {intake.used} {say('step.used')}, "
        f"{len(intake.quarantined)} {say('quarantine')},"
        f" {len(intake.duplicates)} {say('duplicate')}, {len(intake.excluded)} {say('exclusion')};"
        f" {counted(say, len(intake.records), 'slices')}, {patients_text(found, say)}",
    ]
    if (opt_outs := found.opt_outs) is not None:
        lines.append(say("opt-out", listed=opt_outs.listed, found=opt_outs.found))
    for finding in found.findings:
        lines.append(
            f"  {say(finding.level)} [{finding.code}]: {finding_text(finding.code, finding.values, say)}"
        )
        lines.append(f"      → {say(f'{finding.code}.do')}")
    return lines


def _problems(problems: Sequence[SheetProblem], say: Say) -> list[str]:
    if not problems:
        return []
    lines = [say("problems"), *(f"  [{problem.code}] {problem}" for problem in problems[:SHOWN_PROBLEMS])]
    return lines + (
        [f"  {say('more', count=len(problems) - SHOWN_PROBLEMS)}"] if len(problems) > SHOWN_PROBLEMS else []
    )


def _flow(found: Readiness, say: Say) -> list[str]:
    heads = ("", say("files"), say("slices"), say("patients"))
    steps = [
        (say(f"step.{step.name}"), step.files, step.slices, step.patients)
        for step in found.subject.slices.intake.flow
    ]
    rows = left_out(found, say)
    return [say("flow"), *table([heads, *steps]), *(table(rows) if rows else [])]


def _cohort(found: Readiness, say: Say) -> list[str]:
    """Table 1, and who of each part is labelled."""
    if not found.subject.slices.intake.records:
        return []
    columns = found.table["columns"]
    rows = table_rows(list(columns.values()), say)
    rows += [row for row in flow_rows([found.table], say) if row.group == say("cohort.flow.patients")]
    heads = ("", *(say(f"cohort.column.{name}") for name in columns))
    cells = [(row.label, *row.cells, *[""] * (len(columns) - len(row.cells))) for row in rows]
    aligned = iter(table([heads, *cells], indent="    "))
    lines = [say("cohort.table.title"), next(aligned)]
    for group, of_group in groupby(rows, key=lambda row: row.group):
        lines += [f"  {group}", *(next(aligned) for _ in of_group)]
    return lines


def _labels(found: Readiness, say: Say) -> list[str]:
    intake = found.intake
    if found.subject.site is None or not intake.patients_by_part:
        return []
    split = "" if found.split is None else f"; {found.split}"
    lines = [f"{say('labels')} ({say('split')}: {intake.labels.split}{split})"]
    lines += table(
        [
            (
                say("patients"),
                *(f"{say(part)} {count}" for part, count in intake.patients_by_part.items() if count),
            )
        ]
    )
    if (missing := found.next_bucket) is not None:
        key = "next-bucket.one" if missing[0] == 1 else "next-bucket"
        lines.append(f"  {say(key, patients=missing[0], bucket=missing[1])}")
    if not found.has_labels:
        return lines
    rows: list[tuple[object, ...]] = [(say("slices"), say("present"), say("absent"), say("not_assessed"))]
    rows += [
        (name, counts["present"], counts["absent"], counts["not_assessed"])
        for name, counts in intake.label_counts.items()
        if sum(counts.values())
    ]
    lines += table(rows)
    parts = [part for part, count in intake.patients_by_part.items() if count]
    pairs = [
        (artifact, *(f"{of_part[part]['present']} / {of_part[part]['absent']}" for part in parts))
        for artifact, of_part in found.artifact_patients.items()
    ]
    if not pairs:
        return lines
    lines += [f"  {say('patients-labels')}", *table([("", *map(say, parts)), *pairs], indent="    ")]
    sides = ("present", "absent")
    spans = [
        (artifact, *(slices_text(of_side.get(side), say) for side in sides))
        for artifact, of_side in found.artifact_slices.items()
    ]
    return [*lines, f"  {say('slices-each')}", *table([("", *map(say, sides)), *spans], indent="    ")]


def _acquisition(found: Readiness, say: Say) -> list[str]:
    lines: list[str] = []
    for modality, population in found.profile.modalities.items():
        lines.append(
            f"{modality}: {counted(say, population.patients, 'patients')}, "
            f"{counted(say, population.slices, 'slices')}"
        )
        lines += table(field_rows(population, (*ACQUISITION, *MEASURES), say))
    return [say("acquisition"), *lines] if lines else []


def _time(found: Readiness, say: Say) -> list[str]:
    rows = found.scanner_rows()
    if not rows:
        return []
    lines = [say("scanners")]
    for row in rows[:SHOWN]:
        counts = f"{counted(say, row['slices'], 'slices')}, {counted(say, row['patients'], 'patients')}"
        lines.append(
            f"  {row['scanner']}: {translated(row['vendor'], say)}, {translated(row['model'], say)}; {counts}"
        )
    if len(rows) > SHOWN:
        lines.append(f"  {say('more', count=len(rows) - SHOWN)}")
    if found.months:
        lines.append("  " + say("months", first=found.months[0], last=found.months[1]))
    return lines


def _drift(found: Readiness, say: Say) -> list[str]:
    drift = found.drift
    if drift is None:
        return []
    source = say(f"drift.source.{drift.source}")
    lead = say(
        "drift.lead",
        patients=drift.patients,
        compared=say(drift.compared),
        trained=drift.trained_patients,
        source=source,
    )
    rows: list[tuple[object, ...]] = [
        (say("judged"), "", say("field"), say("psi"), say("shifted"), say("before"), say("now"))
    ]
    for move in drift.moves:
        shares = (f"{move.psi:.2f}", f"{move.shifted:.0%}")
        rows.append(
            (
                say(move.verdict),
                move.modality,
                say(move.field),
                *shares,
                translated(move.before, say),
                translated(move.now, say) + new_words(move.new, say),
            )
        )
    return [say("drift-title"), f"  {lead}", *table(rows)]


def new_words(new: Sequence[tuple[str, float]], say: Say) -> str:
    said = ", ".join(f"{name} {share:.0%}" for name, share in new[:SHOWN])
    return f" ({say('new-words', words=translated(said, say))})" if new else ""
