"""Table 1 and flow of each cohort on the report, where the run folder has them: side by side.

A hospital's cohort is not there: nothing of it leaves the hospital, where `fedqc data check` shows the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from common.cohort_table import CohortTable, Column, Row, flow_rows, table_rows
from server.evaluation.report.reading import Reading

Groups = list[tuple[str, list[Row]]]
"""Heading -> the rows below it."""


@dataclass(frozen=True, kw_only=True)
class CohortsView:
    """What the page shows. A column of `table` is a part of a site, one of `flow` a site."""

    sites: list[str]  # titles
    columns: list[tuple[str, str]]  # site and part
    table: Groups
    flow: Groups
    absent: list[str]  # titles of sites without a table

    @property
    def labels(self) -> list[str]:
        """What a column of `table` is called by itself."""
        return [f"{site}: {part}" for site, part in self.columns]


def cohorts_view(reading: Reading, cohorts: Mapping[str, CohortTable]) -> CohortsView:
    """The cohorts in the order of the run's sites: of a training site both parts, else who is scored."""
    tables = [cohorts[site["site"]] for site in reading.sites if site["site"] in cohorts]
    heads: list[tuple[str, str]] = []
    columns: list[Column] = []
    for table in tables:
        parts = [part for part in table["parts"] if part in ("train", "test")]
        for part in [table["scored"]] if table["site"] in reading.held_out else parts:
            if part in table["columns"]:
                heads.append((reading.name(table["site"]), reading.say(f"cohort.column.{part}")))
                columns.append(table["columns"][part])
    chinese = reading.language == "zh"
    return CohortsView(
        sites=[reading.name(table["site"]) for table in tables],
        columns=heads,
        table=_grouped(table_rows(columns, reading.say, chinese=chinese)) if tables else [],
        flow=_grouped(flow_rows(tables, reading.say)) if tables else [],
        absent=[reading.name(site["site"]) for site in reading.sites if site["site"] not in cohorts],
    )


def text_rows(groups: Groups, heads: list[str]) -> list[dict[str, str]]:
    """A table of the view as rows of text."""
    return [
        {"": f"{group}: {row.label}"} | dict(zip(heads, row.cells, strict=True))
        for group, rows in groups
        for row in rows
    ]


def _grouped(rows: list[Row]) -> Groups:
    return [(group, list(own)) for group, own in groupby(rows, key=lambda row: row.group)]
