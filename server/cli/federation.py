"""The `fedqc federation` commands: make a federation, enrol hospitals, run its services."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.cli import Format, FormatOption, show
from common.errors import ConfigError, FedqcError, RefusedError
from common.progress_bar import say, speaking
from common.terminal import print, wrapped

if TYPE_CHECKING:
    from common.enrolment import Kit
    from server.federation.registry import Enrolment, Federation

NO_SUPERLINK = 3

federation = typer.Typer(add_completion=False, no_args_is_help=True)

FederationOption = Annotated[
    Path | None,
    typer.Option(
        "--federation", help="Federation folder. Default: $FEDQC_FEDERATION, then the current directory."
    ),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not prompt.")]
DaysOption = Annotated[int, typer.Option(min=1, max=3650, help="Days until it expires.")]
KitOption = Annotated[
    Path | None,
    typer.Option("--out", help="Kit to write. Default: kit-SITE.zip in the current directory."),
]


@federation.callback()
def _federation_group() -> None:
    """Make a federation, enrol hospitals, run its services."""


@federation.command()
def init(
    name: Annotated[str, typer.Argument(help="Name of the federation: lower case, digits, hyphens.")],
    host: Annotated[str, typer.Option(help="Name or IP address by which hospitals reach this machine.")],
    folder: Annotated[
        Path | None, typer.Option("--dir", "--federation", help="Folder to make. Default: NAME.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port that hospitals connect to; the only open one.")
    ] = 443,
    listen: Annotated[str, typer.Option(help="Address of this machine to listen on.")] = "0.0.0.0",
    superlink_port: Annotated[
        int | None, typer.Option(help="Port of Flower's server, on loopback. Default: a free one.")
    ] = None,
    health_port: Annotated[
        int | None, typer.Option(help="Port of its gRPC health service, on loopback. Default: a free one.")
    ] = None,
    webhook: Annotated[
        str | None, typer.Option(help="URL to notify of silent sites, refusals and finished runs.")
    ] = None,
    passphrase: Annotated[
        bool,
        typer.Option(
            "--passphrase",
            help="Encrypt the key of the certificate authority; asked for, or from $FEDQC_CA_PASSPHRASE.",
        ),
    ] = False,
    format: FormatOption = Format.text,
) -> None:
    """Make a federation folder: keys, certificates, app bundle, configuration of proxy and services."""
    from server.federation.configure import init_federation
    from server.federation.notify import Notify

    secret = _passphrase(new=True) if passphrase else b""
    with speaking(f"making {folder or name}: keys, certificates, the app bundle"):
        made = init_federation(
            folder or Path(name),
            name=name,
            host=host,
            port=port,
            superlink_port=superlink_port,
            health_port=health_port,
            listen=listen,
            notify=Notify(webhook=webhook),
            passphrase=secret,
        )
    show(
        format,
        {"folder": str(made.folder), "address": made.settings.address, "fingerprint": made.fingerprint},
        f"made {made.folder}",
        "back it up and restrict access: anyone who reads keys/ can act as this federation",
        f"hospitals connect to {made.settings.address}; they need no open port of their own",
        "next: fedqc federation start, then fedqc federation approve REQUEST for each hospital",
        *_fingerprint_lines(made),
    )


@federation.command()
def approve(
    request_zip: Annotated[Path, typer.Argument(help="request.zip of the hospital.")],
    federation: FederationOption = None,
    fingerprint: Annotated[
        str | None,
        typer.Option(help="Fingerprint that the hospital read to you. Without it you are asked to type it."),
    ] = None,
    yes: YesOption = False,
    out: KitOption = None,
    days: DaysOption = 365,
    format: FormatOption = Format.text,
) -> int:
    """Enrol a hospital and write its kit. Ask the hospital for the request's fingerprint by telephone."""
    from common.enrolment import read_request, same_fingerprint
    from server.federation.registry import approve as enrol

    opened = open_federation(federation)
    request = read_request(request_zip)
    target = _kit_path(out, request.site)
    about = {
        "site": request.site,
        "kind": f"{request.kind} ({request.stand_in})" if request.stand_in else request.kind,
        "patients": f"about {request.nominal_patients} (size bucket chosen by the hospital)",
        "fedqc": request.version,
    }
    for name, text in about.items():
        say(wrapped(text, start=f"{name:13s}", indent=13))
    if fingerprint is None and not yes:  # typed, not looked at: a comparison by eye is soon skipped
        say("type the fingerprint that the hospital reads to you by telephone; Enter enrols nobody")
        fingerprint = str(typer.prompt("fingerprint", default="", show_default=False, err=True)).strip()
        if not fingerprint:
            raise RefusedError(
                f"{request.site}: not enrolled", code="not-confirmed", hint="nothing was changed"
            )
    if fingerprint is not None and not same_fingerprint(fingerprint, request.fingerprint):
        hint = "nothing was changed; ask by telephone, never take the fingerprint from the request's sender"
        raise ConfigError(
            f"{request_zip}: its fingerprint is not the one that you gave",
            code="wrong-fingerprint",
            hint=hint,
        )
    say(f"{'fingerprint':13s}{request.fingerprint}")
    kit = enrol(opened, request, days)
    _write_kit(opened, kit, target, format)
    return 0


@federation.command()
def renew(
    site: Annotated[
        str | None,
        typer.Argument(help="Site to renew. Default: the server's certificate and the bundle."),
    ] = None,
    federation: FederationOption = None,
    out: KitOption = None,
    days: DaysOption = 365,
    format: FormatOption = Format.text,
) -> int:
    """Renew a site's enrolment and write its kit; or renew the server's certificate and the bundle."""
    from server.federation.certificates import is_sealed
    from server.federation.configure import configure, renew_server_certificate
    from server.federation.flower_app import is_current, write_bundle
    from server.federation.registry import renew_site

    opened = open_federation(federation)
    if site is not None:
        target = _kit_path(out, site)
        _write_kit(opened, renew_site(opened, site, days), target, format)
        return 0
    renew_server_certificate(opened, days, passphrase=_passphrase() if is_sealed(opened.ca_key) else b"")
    left = opened.certificate_days()
    configure(opened)
    lines = [
        f"the server's certificate expires in {left} days; restart the services to use it (between runs)"
    ]
    is_new = not is_current(opened.folder)
    if is_new:
        with speaking("building the app bundle"):
            write_bundle(opened.folder)
        digits = opened.bundle_sha256[:16]
        lines += [f"the bundle is new ({digits}…); each site needs a new kit before its next run:"]
        lines += _renewals(opened)
    said = {"certificate_days": left, "bundle_sha256": opened.bundle_sha256}
    show(format, said | {"needs_kit": _active(opened) if is_new else []}, *lines)
    return 0


@federation.command()
def rotate(
    federation: FederationOption = None,
    authority: Annotated[
        bool, typer.Option("--authority", help="Replace the certificate authority, too.")
    ] = False,
    passphrase: Annotated[
        bool,
        typer.Option(
            "--passphrase", help="Encrypt the new authority's key. A key that is encrypted stays so."
        ),
    ] = False,
    yes: YesOption = False,
    format: FormatOption = Format.text,
) -> int:
    """Replace the coordinator's key. Sites stay enrolled, and join with a renewed kit."""
    from server.federation.certificates import is_sealed
    from server.federation.configure import configure
    from server.federation.configure import rotate as replace
    from server.federation.services import running

    opened = open_federation(federation)
    if running(opened):
        raise ConfigError(
            f"{opened.name}: is running", code="already-running", hint="fedqc federation stop, then again"
        )
    if passphrase and not authority:
        raise ConfigError("--passphrase is of the authority's key", code="bad-argument", hint="--authority")
    what = "key and certificate authority" if authority else "key"
    if not yes and not typer.confirm(
        f"Replace the {what}? Every site must join with a new kit before its next run", err=True
    ):
        raise RefusedError("not rotated", code="not-confirmed", hint="nothing was changed")
    seals = authority and (passphrase or is_sealed(opened.ca_key))
    replace(opened, authority=authority, passphrase=_passphrase(new=True) if seals else b"")
    configure(opened)
    show(
        format,
        {"authority": authority, "fingerprint": opened.fingerprint, "needs_kit": _active(opened)},
        f"the {what} was replaced; back up the folder. Each site needs a new kit before its next run:",
        *_renewals(opened),
        *_fingerprint_lines(opened),
    )
    return 0


@federation.command()
def revoke(
    site: Annotated[str, typer.Argument(help="Site to exclude permanently.")],
    federation: FederationOption = None,
    yes: YesOption = False,
    format: FormatOption = Format.text,
) -> int:
    """Exclude a site. Answers are ignored, the node is disconnected, its keys are never accepted again."""
    from server.federation.registry import revoke as exclude
    from server.federation.services import running

    opened = open_federation(federation)
    enrolment = opened.site(site)
    if not yes and not typer.confirm(
        f"Exclude {site} ({enrolment.request.kind}, enrolled {enrolment.approved}) permanently?", err=True
    ):
        raise RefusedError(f"{site}: not revoked", code="not-confirmed", hint="nothing was changed")
    exclude(opened, site)
    when = "within seconds" if running(opened) else "at the next fedqc federation start"
    text = f"{site}: revoked. Its answers are ignored; its node is disconnected {when}."
    show(format, {"site": site, "status": "revoked"}, text)
    return 0


@federation.command()
def sites(federation: FederationOption = None, format: FormatOption = Format.text) -> int:
    """List enrolled sites: status, last contact, version, days left, readiness.

    Exit status 3: the SuperLink does not answer.
    """
    from server.federation.certificates import WARN_DAYS

    opened = open_federation(federation)
    with speaking("asking the SuperLink"):
        rows = site_rows(opened)
    status = NO_SUPERLINK if any(row["connection"] == "unknown" for row in rows) else 0
    if format is Format.json:
        print(json.dumps(rows, ensure_ascii=False))
        return status
    print(sites_table(rows))
    left = opened.certificate_days()
    say(
        f"the server's certificate expires in {left} days"
        + (": fedqc federation renew" if left <= WARN_DAYS else "")
    )
    for line in opened.enrolments_to_renew():
        say(line)
    if status:
        say("the SuperLink does not answer: fedqc federation start")
    return status


@federation.command()
def start(
    federation: FederationOption = None,
    no_proxy: Annotated[
        bool, typer.Option("--no-proxy", help="Do not start nginx: systemd or another host runs it.")
    ] = False,
) -> int:
    """Run the services (proxy, SuperLink, SuperExec) until Ctrl-C; restart any that ends. Logs: state/."""
    from server.federation.flower_app import is_current
    from server.federation.services import serve

    opened = open_federation(federation)
    if not is_current(opened.folder):
        say(
            "the app bundle is from another version of fedqc: run fedqc federation renew, then send every "
            "site a new kit"
        )
    if os.geteuid() == 0:
        say("running as root is not needed: use a separate user, see systemd/")
    return serve(opened, proxy=not no_proxy, say=say)


@federation.command()
def stop(federation: FederationOption = None, format: FormatOption = Format.text) -> int:
    """Stop the services of `start`. A run in progress stops too; `fedqc run resume` continues it."""
    from server.federation.services import stop as end

    opened = open_federation(federation)
    with speaking(f"{opened.name}: stopping"):
        end(opened)
    show(format, {"federation": opened.name, "status": "stopped"}, f"{opened.name}: stopped")
    return 0


def sites_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of `fedqc federation sites`, at most 80 columns wide.

    A long name has a line of its own, and so has what a site answered in the last rehearsal.
    """
    widths = (22, 9, 15, 21, 8)
    lines = [_columns(("site", "status", "connection", "last contact", "version"), widths) + "days"]
    for row in rows:
        name = row["site"]
        if len(name) >= widths[0]:
            lines.append(name)
            name = ""
        cells = (name, row["status"], row["connection"], row["last_contact"] or "-", row["version"])
        lines.append(_columns(cells, widths) + f"{row['enrolment_days']:>4d}")
        if ready := row["readiness"]:
            text = f"last rehearsal: {ready['answer']} (plan {ready['plan']})"
            lines += textwrap.wrap(text, 80, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def _columns(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(cell.ljust(width - 1) + " " for cell, width in zip(cells, widths, strict=True))


def site_rows(federation: Federation) -> list[dict[str, Any]]:
    """One entry a site, by name, as `sites --format json` gives it.

    `status` is active, expired or revoked; `connection` is the SuperLink's status of the node, or `unknown`
    if it does not answer.
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
    """The SuperLink's nodes by number; None if it does not answer."""
    from server.federation.services import flower_nodes

    try:
        return {int(node["node-id"]): node for node in flower_nodes(federation)}
    except FedqcError:
        return None


def _last_answers(federation: Federation) -> dict[str, dict[str, Any]]:
    """Each site's answer in the last rehearsal (`run check`, `run start`)."""
    answers: dict[str, dict[str, Any]] = {}
    for path in sorted(
        (federation.state / "orders").glob("*.check.json"), key=lambda path: path.stat().st_mtime
    ):
        try:
            check = json.loads(path.read_text(encoding="utf-8"))
            plan, entries = str(check["plan"]), check["sites"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        for site, entry in entries:
            answers[site] = {
                "plan": plan,
                "answer": str(entry.get("answer", "")),
                "takes_part": entry.get("takes_part") is True,
            }
    return answers


CA_PASSPHRASE = "FEDQC_CA_PASSPHRASE"
MIN_PASSPHRASE = 12


def _passphrase(*, new: bool = False) -> bytes:
    """The passphrase of the certificate authority's key: from `CA_PASSPHRASE`, else typed at a terminal, a
    new one twice.

    Raises:
        ConfigError: there is neither (code `wrong-passphrase`), or a new one is too short (`bad-argument`).
    """
    given = os.environ.get(CA_PASSPHRASE, "")
    if not given:
        if not _is_terminal():
            raise ConfigError(
                "the key of the certificate authority has a passphrase, and nobody can be asked for it",
                code="wrong-passphrase",
                hint=f"run the command at a terminal, or set {CA_PASSPHRASE}",
            )
        question = "passphrase of the certificate authority's key"
        given = str(typer.prompt(question, hide_input=True, confirmation_prompt=new, err=True))
    if new and len(given) < MIN_PASSPHRASE:
        raise ConfigError(
            f"the passphrase has fewer than {MIN_PASSPHRASE} characters",
            code="bad-argument",
            hint="take several words",
        )
    return given.encode()


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def open_federation(folder: Path | None) -> Federation:
    """The federation that `--federation`, FEDQC_FEDERATION or the current folder names."""
    from server.federation.registry import FEDERATION, Federation

    chosen = folder or (Path(os.environ["FEDQC_FEDERATION"]) if "FEDQC_FEDERATION" in os.environ else None)
    if chosen is None and not Path(FEDERATION).is_file():
        hint = "use --federation DIR or $FEDQC_FEDERATION; make one: fedqc federation init"
        raise ConfigError(
            f"{Path.cwd()}: no {FEDERATION} in this directory", code="no-such-federation", hint=hint
        )
    return Federation.open(chosen or Path())


def _kit_path(out: Path | None, site: str) -> Path:
    """Path of the kit, checked before anything is changed."""
    path = out or Path(f"kit-{site}.zip")
    if path.exists():
        raise ConfigError(
            f"{path}: already exists", code="output-exists", hint="nothing was changed; use --out"
        )
    if not path.absolute().parent.is_dir():
        raise ConfigError(
            f"{path.absolute().parent}: no such folder", code="not-writable", hint="nothing was changed"
        )
    return path


def _write_kit(federation: Federation, kit: Kit, path: Path, format: Format) -> None:
    from common.enrolment import write_kit

    write_kit(path, kit, federation.signing_key())
    said = {"site": kit.site, "kit": str(path), "expires": kit.expires.isoformat()}
    show(
        format,
        said | {"fingerprint": federation.fingerprint},
        f"wrote {path} for {kit.site}, valid until {kit.expires}",
        "it holds no private key and may be sent by mail",
        *_fingerprint_lines(federation),
    )


def _fingerprint_lines(federation: Federation) -> tuple[str, ...]:
    return (
        "give the hospital this fingerprint by telephone or letter, not with the kit;",
        "it is typed when the site joins:",
        f"fingerprint: {federation.fingerprint}",
    )


def _active(federation: Federation) -> list[str]:
    return [enrolment.site for enrolment in federation.sites() if enrolment.status == "active"]


def _renewals(federation: Federation) -> list[str]:
    """The commands that write a new kit for each site."""
    return [f"  fedqc federation renew {site}" for site in _active(federation)]
