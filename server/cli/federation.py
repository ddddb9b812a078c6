"""`fedqc federation`: what a coordinator does besides runs."""

from __future__ import annotations

import hmac
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.cli import Format, FormatOption
from common.errors import ConfigError, FedqcError, RefusedError
from common.progress_bar import say

if TYPE_CHECKING:
    from common.enrolment import Kit
    from server.federation.registry import Enrolment, Federation

NO_SUPERLINK = 3

federation = typer.Typer(add_completion=False, no_args_is_help=True)

FederationOption = Annotated[
    Path | None,
    typer.Option(
        "--federation", help="Federation folder; else FEDQC_FEDERATION, else the present folder if it is one."
    ),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Ask nothing.")]
DaysOption = Annotated[int, typer.Option(min=1, max=3650, help="How long the enrolment lasts.")]
KitOption = Annotated[
    Path | None,
    typer.Option("--out", help="The kit to write; by default kit-<site>.zip in the present folder."),
]


@federation.callback()
def _federation_group() -> None:
    """Make a federation, enrol hospitals, run its services."""


@federation.command()
def init(
    name: Annotated[str, typer.Argument(help="Of the federation: lower case, digits, hyphens.")],
    host: Annotated[str, typer.Option(help="Name or IP address by which hospitals reach this machine.")],
    folder: Annotated[
        Path | None, typer.Option("--dir", "--federation", help="Folder to make; by default NAME.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The only port that hospitals need.")] = 443,
    listen: Annotated[str, typer.Option(help="Address of this machine to take connections on.")] = "0.0.0.0",
    superlink_port: Annotated[
        int | None, typer.Option(help="Of Flower's server, on loopback; by default a free one.")
    ] = None,
    health_port: Annotated[
        int | None, typer.Option(help="Of its gRPC health service, on loopback; by default a free one.")
    ] = None,
    webhook: Annotated[
        str | None, typer.Option(help="URL that is told of silent sites, refusals and finished runs.")
    ] = None,
) -> None:
    """Make a federation's folder: keys, certificates, the bundle for hospitals' nodes, proxy and services."""
    from server.federation.configure import init_federation
    from server.federation.notify import Notify

    made = init_federation(
        folder or Path(name),
        name=name,
        host=host,
        port=port,
        superlink_port=superlink_port,
        health_port=health_port,
        listen=listen,
        notify=Notify(webhook=webhook),
    )
    print(
        f"made {made.folder}: back it up, and keep it closed; whoever reads keys/ can act as this federation"
    )
    print(f"hospitals reach it as {made.settings.address}; they need no open port of their own")
    print("next: fedqc federation start; then fedqc federation approve with each hospital's request.zip")
    _print_fingerprint(made)


@federation.command()
def approve(
    request_zip: Annotated[Path, typer.Argument(help="request.zip of a hospital.")],
    federation: FederationOption = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="As the hospital read it to you; then nothing needs comparing.")
    ] = None,
    yes: YesOption = False,
    out: KitOption = None,
    days: DaysOption = 365,
) -> int:
    """Enrol a hospital and write the kit that answers its request. Ask the hospital for the fingerprint by
    telephone.
    """
    from common.enrolment import read_request
    from server.federation.registry import approve as enrol

    opened = open_federation(federation)
    request = read_request(request_zip)
    target = _kit_path(out, request.site)
    if fingerprint is not None and not hmac.compare_digest(
        _digits(fingerprint), _digits(request.fingerprint)
    ):
        hint = (
            "nothing was changed; ask by telephone, and do not take the fingerprint from where the "
            "request came from"
        )
        raise ConfigError(
            f"{request_zip}: its fingerprint is not the one you gave", code="wrong-fingerprint", hint=hint
        )
    say(
        f"site         {request.site}\nkind         {request.kind}"
        + (f" ({request.stand_in})" if request.stand_in else "")
    )
    say(
        f"patients     about {request.nominal_patients} (a bucket that the hospital picked)\nfedqc     "
        "   "
        f"{request.version}"
    )
    say(f"fingerprint  {request.fingerprint}")
    if (
        fingerprint is None
        and not yes
        and not typer.confirm("Did the hospital read you this fingerprint?", err=True)
    ):
        raise RefusedError(
            f"{request.site}: was not enrolled", code="not-confirmed", hint="nothing was changed"
        )
    kit = enrol(opened, request, days)
    _write_kit(opened, kit, target)
    return 0


@federation.command()
def renew(
    site: Annotated[
        str | None,
        typer.Argument(help="A site: a kit that lasts longer. None: the server's certificate and bundle."),
    ] = None,
    federation: FederationOption = None,
    out: KitOption = None,
    days: DaysOption = 365,
) -> int:
    """Renew one site's enrolment; or the server's certificate, the bundle and the configuration, from what is
    installed now.
    """
    from server.federation.configure import configure, renew_server_certificate
    from server.federation.flower_app import is_current, write_bundle
    from server.federation.registry import renew_site

    opened = open_federation(federation)
    if site is not None:
        target = _kit_path(out, site)
        _write_kit(opened, renew_site(opened, site, days), target)
        return 0
    renew_server_certificate(opened, days)
    left = opened.certificate_days()
    configure(opened)
    print(
        f"the server's certificate lasts {left} days; services take it when they are started again "
        "(between two runs)"
    )
    if not is_current(opened.folder):
        write_bundle(opened.folder)
        print(
            f"the bundle is new ({opened.bundle_sha256[:16]}…): nodes serve it once they have a new kit, "
            "so for each site:"
        )
        for enrolment in opened.sites():
            if enrolment.status == "active":
                print(f"  fedqc federation renew {enrolment.site}")
    return 0


@federation.command()
def revoke(
    site: Annotated[str, typer.Argument(help="Site to exclude, for good.")],
    federation: FederationOption = None,
    yes: YesOption = False,
) -> int:
    """Exclude a site: its answers count no more, its node can connect no more. Its keys never come back."""
    from server.federation.registry import revoke as exclude
    from server.federation.services import running

    opened = open_federation(federation)
    enrolment = opened.site(site)
    if not yes and not typer.confirm(
        f"Exclude {site} ({enrolment.request.kind}, enrolled {enrolment.approved}) for good?", err=True
    ):
        raise RefusedError(f"{site}: was not revoked", code="not-confirmed", hint="nothing was changed")
    exclude(opened, site)
    when = "within seconds" if running(opened) else "at the next fedqc federation start"
    print(f"{site}: revoked. Its answers count no more; its node is shut out {when}.")
    return 0


@federation.command()
def sites(federation: FederationOption = None, format: FormatOption = Format.text) -> int:
    """Who is enrolled: status, last contact, version, days left, readiness. Exit status 3: the SuperLink does
    not answer.
    """
    from server.federation.certificates import WARN_DAYS

    opened = open_federation(federation)
    rows = site_rows(opened)
    status = NO_SUPERLINK if any(row["connection"] == "unknown" for row in rows) else 0
    if format is Format.json:
        print(json.dumps(rows, ensure_ascii=False))
        return status
    print(
        f"{'site':20s}{'status':10s}{'connection':14s}{'last contact':24s}{'version':10s}{'days':>6s}  "
        "readiness"
    )
    for row in rows:
        ready = row["readiness"]
        shown = f"{ready['answer']} ({ready['plan']})" if ready else "-"
        last = row["last_contact"] or "-"
        print(
            f"{row['site']:20s}{row['status']:10s}{row['connection']:14s}{last:24s}{row['version']:10s}{row['enrolment_days']:>6d}  {shown}"
        )
    left = opened.certificate_days()
    say(
        f"the server's certificate lasts {left} days"
        + (": fedqc federation renew" if left <= WARN_DAYS else "")
    )
    for row in rows:
        if row["status"] == "active" and row["enrolment_days"] <= WARN_DAYS:
            say(f"{row['site']}: its enrolment ends soon: fedqc federation renew {row['site']}")
    if status:
        say("the SuperLink does not answer: fedqc federation start")
    return status


@federation.command()
def start(
    federation: FederationOption = None,
    no_proxy: Annotated[
        bool, typer.Option("--no-proxy", help="The proxy is run by systemd, or elsewhere.")
    ] = False,
) -> int:
    """Run proxy, SuperLink and SuperExec until Ctrl-C, starting again what ends. Logs lie in state/."""
    from server.federation.flower_app import is_current
    from server.federation.services import serve

    opened = open_federation(federation)
    if not is_current(opened.folder):
        say(
            "the bundle was made by another installation of fedqc: fedqc federation renew, then a kit for "
            "every site"
        )
    if os.geteuid() == 0:
        say("running as root: a user of its own is enough, see systemd/")
    return serve(opened, proxy=not no_proxy, say=say)


@federation.command()
def stop(federation: FederationOption = None) -> int:
    """End the services that `start` runs. A run that is under way ends too; `fedqc run resume` goes on with
    it.
    """
    from server.federation.services import stop as end

    opened = open_federation(federation)
    end(opened)
    print(f"{opened.name}: stopped")
    return 0


def site_rows(federation: Federation) -> list[dict[str, Any]]:
    """One entry a site, by name, as `sites --format json` gives it.

    `status` is active, expired or revoked; `connection` is what the SuperLink says of its node, or `unknown`
    where it does not answer.
    """
    nodes = _nodes(federation)
    left = federation.certificate_days()
    checks = _last_answers(federation)
    return [_row(enrolment, nodes, left, checks.get(enrolment.site)) for enrolment in federation.sites()]


def _row(
    enrolment: Enrolment, nodes: dict[int, dict[str, Any]] | None, left: int, check: dict[str, Any] | None
) -> dict[str, Any]:
    from datetime import UTC, datetime

    node = None if nodes is None or enrolment.node_id is None else nodes.get(enrolment.node_id)
    status = (
        "revoked" if enrolment.status == "revoked" else "active" if enrolment.may_take_part() else "expired"
    )
    connection = "unknown" if nodes is None else "not registered" if node is None else str(node["status"])
    times = (
        []
        if node is None
        else [str(node[key]) for key in ("online-at", "offline-at") if str(node[key])[:1].isdigit()]
    )
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%SZ")  # as Flower writes its times
    return {
        "site": enrolment.site,
        "status": status,
        "kind": enrolment.request.kind,
        "connection": connection,
        "last_contact": now if connection == "online" else max(times, default=None),
        "version": enrolment.request.version,
        "enrolment_days": (enrolment.expires - datetime.now(UTC).date()).days,
        "certificate_days": left,
        "readiness": check,
    }


def _nodes(federation: Federation) -> dict[int, dict[str, Any]] | None:
    """What the SuperLink knows of its nodes; None where it does not answer."""
    from server.federation.services import flower_nodes

    try:
        return {int(node["node-id"]): node for node in flower_nodes(federation)}
    except FedqcError:
        return None


def _last_answers(federation: Federation) -> dict[str, dict[str, Any]]:
    """What each site said at the last rehearsal (`run check`, `run start`)."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(
        (federation.state / "orders").glob("*.check.json"), key=lambda path: path.stat().st_mtime
    ):
        try:
            check = json.loads(path.read_text(encoding="utf-8"))
            plan, answers = str(check["plan"]), check["sites"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        for site, entry in answers:
            found[site] = {
                "plan": plan,
                "answer": str(entry.get("answer", "")),
                "takes_part": entry.get("takes_part") is True,
            }
    return found


def open_federation(folder: Path | None) -> Federation:
    """The federation that `--federation`, FEDQC_FEDERATION or the current folder names."""
    from server.federation.registry import FEDERATION, Federation

    chosen = folder or (Path(os.environ["FEDQC_FEDERATION"]) if "FEDQC_FEDERATION" in os.environ else None)
    if chosen is None and not Path(FEDERATION).is_file():
        hint = "--federation DIR, FEDQC_FEDERATION, or go there; fedqc federation init makes one"
        raise ConfigError(f"{Path.cwd()}: no {FEDERATION} here", code="no-such-federation", hint=hint)
    return Federation.open(chosen or Path())


def _kit_path(out: Path | None, site: str) -> Path:
    """Where a kit goes; known to be free before anything is changed."""
    path = out or Path(f"kit-{site}.zip")
    if path.exists():
        raise ConfigError(
            f"{path}: exists already", code="output-exists", hint="nothing was changed; --out names another"
        )
    if not path.absolute().parent.is_dir():
        raise ConfigError(
            f"{path.absolute().parent}: no such folder", code="not-writable", hint="nothing was changed"
        )
    return path


def _write_kit(federation: Federation, kit: Kit, path: Path) -> None:
    from common.enrolment import write_kit

    write_kit(path, kit, federation.signing_key())
    print(
        f"wrote {path}: for {kit.site}, until {kit.expires}; it holds no private key and may be sent by mail"
    )
    _print_fingerprint(federation)


def _print_fingerprint(federation: Federation) -> None:
    print(
        "give hospitals this federation's fingerprint another way than the kit (telephone, letterhead); "
        "they type it when they join:"
    )
    print(f"fingerprint: {federation.fingerprint}")


def _digits(fingerprint: str) -> bytes:
    """As people write it: with hyphens, spaces or colons, in either case."""
    return "".join(fingerprint.split()).replace("-", "").replace(":", "").lower().encode()
