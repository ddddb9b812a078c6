"""Say a site report in words: text for the terminal, and one offline HTML page with pictures."""

from __future__ import annotations

from itertools import groupby

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from client.data_check.page import CT_WINDOW_HU, flow_figure
from client.data_check.text import table
from client.predict import text
from client.predict.mistakes import Mistake
from client.predict.page import SIDE, caption, png
from client.predict.site_report import ArtifactScore, Share, SiteReport, file_of
from client.predict.words import LANGUAGES
from common.cohort_table import flow_rows, table_rows
from common.i18n import Say, speaker

COLUMNS = (
    "artifact",
    "site.n",
    "site.auroc",
    "site.sensitivity",
    "site.specificity",
    "site.alarms",
    "site.of",
)
KINDS = ("miss", "false alarm")


def render(report: SiteReport, language: str, *, names: bool = False) -> str:
    """The page as one string. Every value is escaped.

    Args:
        names: show file names.
    """
    say = speaker(language, LANGUAGES)
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("client.predict", "."), PackageLoader("client.data_check", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    low, high = CT_WINDOW_HU
    pictures = list(zip(report.mistakes, report.pictures, strict=True))
    return environment.get_template("site_report.html.j2").render(
        say=say,
        language=language,
        names=names,
        report=report,
        scored=scored_text(report, say),
        not_scored=not_scored_text(report, say),
        columns=[say(name) for name in COLUMNS],
        rows=[score_row(score, say) for score in report.scores],
        undecided=undecided_text(report, say),
        kinds=[
            (
                kind,
                [
                    (
                        png(picture),
                        f"{caption(picture, report.found, say)} · {_beyond(one, say)}"
                        + (f" · {file_of(one, report)}" if names else ""),
                    )
                    for one, picture in pictures
                    if one.kind == kind
                ],
            )
            for kind in KINDS
        ],
        side=SIDE,
        window=say("window", low=f"{low:g}", high=f"{high:g}"),
        flow=flow_figure(report.table, say),
        cohort_columns=list(report.table["columns"]),
        cohort_rows=groupby(
            table_rows(list(report.table["columns"].values()), say, chinese=language == "zh"),
            key=lambda row: row.group,
        ),
        basis=text.basis_rows(report.found, say),
    )


def report_text(report: SiteReport, language: str, *, names: bool = False) -> str:
    """What the terminal shows, in 80 columns; Table 1 and the flow as on the page.

    Args:
        names: show file names.
    """
    say = speaker(language, LANGUAGES)
    lines = [scored_text(report, say)]
    lines += text.wrapped(not_scored_text(report, say), "")
    lines += text.wrapped(say("not-a-device"), "")
    lines += ["", say("site.good")]
    for score in report.scores:
        name, *figures = score_row(score, say)
        named = (f"{say(column)} {figure}" for column, figure in zip(COLUMNS[1:], figures, strict=True))
        lines += text.wrapped(f"{name}: {', '.join(named)}", "  ")
    lines += text.wrapped(undecided_text(report, say), "  ")
    lines += text.wrapped(say("site.note"), "  ")
    for kind in KINDS:
        lines += ["", say(f"site.{kind}")]
        own = [pair for pair in zip(report.mistakes, report.pictures, strict=True) if pair[0].kind == kind]
        for one, picture in own:
            said = f"{caption(picture, report.found, say)}; {_beyond(one, say)}"
            lines += text.wrapped(said + (f"; {file_of(one, report)}" if names else ""), "  ")
        if not own:
            lines.append(f"  {say('site.none')}")
    lines += ["", say("cohort.table.title")]
    columns = report.table["columns"]
    for group, rows in groupby(
        table_rows(list(columns.values()), say, chinese=language == "zh"), key=lambda row: row.group
    ):
        lines.append(f"  {group}")
        for row in rows:
            cells = (
                f"{say(f'cohort.column.{column}')} {cell}"
                for column, cell in zip(columns, row.cells, strict=True)
            )
            lines += text.wrapped(f"{row.label}: {', '.join(cells)}", "    ")
    lines += ["", say("cohort.flow.title")]
    for group, rows in groupby(flow_rows([report.table], say), key=lambda row: row.group):
        lines += table([(group, ""), *((row.label, *row.cells) for row in rows)])
    lines += ["", say("basis")]
    for name, said in text.basis_rows(report.found, say):
        lines += text.wrapped(f"{name}: {said}", "  ")
    return "\n".join(line.rstrip() for line in lines)


def scored_text(report: SiteReport, say: Say) -> str:
    """How many patients the figures are of."""
    return say("site.scored", count=report.patients)


def not_scored_text(report: SiteReport, say: Say) -> str:
    """Whose scores would be no fair ones, and who could not be scored."""
    counts = report.not_scored()
    left = say("site.left-out", train=counts["train"], validation=counts["validation"])
    more = [
        say(f"site.{name}", count=count)
        for name, count in (
            ("unlabelled", counts["unlabelled"]),
            ("not-judged", report.unjudged),
            ("no-part", counts["none"]),
        )
        if count
    ]
    return " ".join([left, *more])


def undecided_text(report: SiteReport, say: Say) -> str:
    """Artifacts that predict does not decide, so that no image of them is a mistake; "" if none."""
    names = [text.artifact_text(one.artifact, say) for one in report.scores if one.point is None]
    return say("site.undecided", artifacts=", ".join(names)) if names else ""


def score_row(score: ArtifactScore, say: Say) -> tuple[str, ...]:
    """The cells of `COLUMNS`."""
    auroc = "–"
    if score.auroc == score.auroc:
        auroc = f"{score.auroc:.2f} [{score.low:.2f}, {score.high:.2f}]"
    alarms = score.alarms_per_100
    return (
        text.artifact_text(score.artifact, say),
        f"{score.positives} / {score.negatives}",
        auroc,
        _share(score.sensitivity),
        _share(score.specificity),
        "–" if alarms is None else f"{alarms:.0f}",
        "–"
        if score.point is None
        else f"{say(f'site.on.{score.point.origin}')} {score.point.threshold:+.2f}",
    )


def _share(share: Share | None) -> str:
    if share is None or not share.of:
        return "–"
    low, high = share.interval
    return f"{100 * share.value:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def _beyond(one: Mistake, say: Say) -> str:
    return say("site.beyond", beyond=f"{one.beyond:.2f}")
