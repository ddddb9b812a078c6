"""What `docker/` promises, checked without a Docker engine.

Each rule is a function from a file's content to what is wrong with it, and each is shown to find a fault that
was planted.
"""

from __future__ import annotations

import copy
import importlib
import importlib.resources
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import click
import pytest
import typer
import yaml

from common.cli import COMMANDS, SILENT
from tests.helpers.command_line import ROOT

DOCKER = ROOT / "docker"
COORDINATOR, SITE, GPU = "compose.coordinator.yaml", "compose.site.yaml", "compose.site.gpu.yaml"
USER = "49999:49999"
VERSION: str = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
SETTINGS = {
    "FEDQC_COORDINATOR": "/srv/coordinator",
    "FEDQC_PORT": "8443",
    "FEDQC_SITE": "/srv/site",
    "FEDQC_DATA": "/srv/data",
}
# a whole version, never a moving tag
IMAGE = re.compile(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?")

Service = dict[str, Any]
Services = dict[str, Service]


def compose(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text(encoding="utf-8"))
    return found


def services(name: str) -> Services:
    """The services of a compose file, with its variables filled in."""
    text = re.sub(
        r"\$\{(\w+)(?::?[?-][^}]*)?\}",
        lambda found: SETTINGS.get(found[1], "8g"),
        json.dumps(compose(name)["services"]),
    )
    found: Services = json.loads(text)
    return found


def mounts(service: Service) -> dict[str, tuple[str, bool]]:
    """Where each folder of the host is seen: target → (source, can be written)."""
    return {
        volume["target"]: (volume["source"], not volume.get("read_only", False))
        for volume in service.get("volumes", [])
    }


def bind(source: str, target: str, *, read_only: bool = False) -> dict[str, Any]:
    return {
        "type": "bind",
        "source": source,
        "target": target,
        "read_only": read_only,
        "bind": {"create_host_path": False},
    }


# ---- the compose files


def without_confinement(all_services: Services) -> Iterator[str]:
    """Root, a writable image, capabilities, unlimited memory or processes, images that move, no health, no
    restart.
    """
    for name, service in all_services.items():
        if service.get("user") != USER:
            yield f"{name}: runs as {service.get('user', 'whoever the image says')}"
        if service.get("read_only") is not True or not any(
            str(path).startswith("/tmp:") for path in service.get("tmpfs", [])
        ):
            yield f"{name}: the image can be written, or there is no /tmp in memory"
        if service.get("cap_drop") != ["ALL"] or "cap_add" in service or service.get("privileged"):
            yield f"{name}: capabilities"
        if service.get("security_opt") != ["no-new-privileges:true"]:
            yield f"{name}: may gain privileges"
        if service.get("init") is not True:
            yield f"{name}: nobody collects ended children"
        if not service.get("mem_limit") or not service.get("pids_limit"):
            yield f"{name}: no limit on memory or processes"
        if not IMAGE.fullmatch(str(service.get("image", ""))):
            yield f"{name}: image {service.get('image')} is not pinned"
        if any(service.get(key) == "host" for key in ("network_mode", "pid", "ipc", "userns_mode")):
            yield f"{name}: shares a namespace of the host"
        if any("docker.sock" in source for source, _ in mounts(service).values()):
            yield f"{name}: holds the engine"
        if any(
            volume["type"] != "bind" or volume["bind"] != {"create_host_path": False}
            for volume in service.get("volumes", [])
        ):
            yield f"{name}: a folder that is not there would be made"
        if "profiles" not in service and service.get("restart") != "unless-stopped":
            yield f"{name}: is not started again"
        if "profiles" not in service and service.get("healthcheck", {}).get("test", [""])[0] != "CMD":
            yield f"{name}: nobody asks whether it works"


def ways_around_the_wall(all_services: Services) -> Iterator[str]:
    """Of a hospital: data beside a network, data that can be written, a node that sees more than node/ and
    run/, ports.
    """
    for name, service in all_services.items():
        seen, offline = mounts(service), service.get("network_mode") == "none"
        if "/data" in seen and (not offline or seen["/data"][1]):
            yield f"{name}: sees the data and has a network, or can change it"
        if not offline and set(seen) != {"/site/node", "/site/run"}:
            yield f"{name}: has a network and sees {sorted(seen)}"
        if "ports" in service:
            yield f"{name}: can be reached"
        if offline and ("networks" in service or "HTTPS_PROXY" in service.get("environment", [])):
            yield f"{name}: is promised no network and told of one"
    agent = mounts(all_services["agent"])
    if {target for target, (_, writable) in agent.items() if writable} != {"/site/state", "/site/run"}:
        yield "agent: writes elsewhere than in state/ and run/"
    if not any(path.startswith("/site/node:") for path in all_services["agent"]["tmpfs"]):
        yield "agent: sees the node's key"
    if "--require-isolation" not in all_services["agent"]["command"]:
        yield "agent: would start with a network too"


def other_ways_in(all_services: Services) -> Iterator[str]:
    """Of the coordinator: a port that is not the proxy's, a proxy that sees other keys than its own."""
    published = {name: service["ports"] for name, service in all_services.items() if "ports" in service}
    if published != {"proxy": ["8443:8443"]}:
        yield f"published: {published}"
    if (
        all_services["coordinator"].get("network_mode") != "service:proxy"
        or "networks" in all_services["coordinator"]
    ):
        yield "coordinator: not on the proxy's loopback"
    seen = {
        target.removeprefix("/coordinator/federation"): writable
        for target, (_, writable) in mounts(all_services["proxy"]).items()
    }
    if seen != {"/proxy": True, "/certificates": False, "/keys/server.key": False}:
        yield f"proxy: sees {sorted(seen)}"


RULES: dict[str, list[Callable[[Services], Iterator[str]]]] = {
    COORDINATOR: [without_confinement, other_ways_in],
    SITE: [without_confinement, ways_around_the_wall],
}
PLANTED: list[tuple[str, str, dict[str, Any]]] = [
    (SITE, "agent", {"network_mode": "bridge"}),
    (SITE, "agent", {"networks": ["outside"]}),
    (SITE, "agent", {"volumes": [bind("/srv/site", "/site"), bind("/srv/data", "/data", read_only=True)]}),
    (SITE, "agent", {"volumes": [*services(SITE)["agent"]["volumes"][:-1], bind("/srv/data", "/data")]}),
    (SITE, "agent", {"tmpfs": ["/tmp:size=1m"]}),
    (SITE, "agent", {"command": ["site", "start", "--only", "agent"]}),
    (
        SITE,
        "node",
        {"volumes": [*services(SITE)["node"]["volumes"], bind("/srv/data", "/data", read_only=True)]},
    ),
    (SITE, "node", {"volumes": [bind("/srv/site", "/site", read_only=True)]}),
    (SITE, "node", {"ports": ["8080:8080"]}),
    (SITE, "node", {"user": "0:0"}),
    (SITE, "node", {"read_only": False}),
    (SITE, "node", {"restart": "no"}),
    (SITE, "node", {"healthcheck": {"test": ["NONE"]}}),
    (SITE, "desk", {"network_mode": "host"}),
    (
        SITE,
        "desk",
        {
            "volumes": [
                {"type": "bind", "source": "/srv/site", "target": "/site", "bind": {"create_host_path": True}}
            ]
        },
    ),
    (COORDINATOR, "coordinator", {"ports": ["9092:9092"]}),
    (COORDINATOR, "coordinator", {"network_mode": "host"}),
    (COORDINATOR, "coordinator", {"image": "fedqc:latest"}),
    (COORDINATOR, "coordinator", {"cap_drop": []}),
    (COORDINATOR, "coordinator", {"security_opt": []}),
    (COORDINATOR, "proxy", {"image": "nginx"}),
    (COORDINATOR, "proxy", {"mem_limit": None}),
    (
        COORDINATOR,
        "proxy",
        {"volumes": [bind("/srv/coordinator/federation", "/coordinator/federation", read_only=True)]},
    ),
    (COORDINATOR, "proxy", {"volumes": [bind("/var/run/docker.sock", "/var/run/docker.sock")]}),
]


@pytest.mark.parametrize("name", RULES)
def test_the_compose_files_keep_what_they_promise(name: str) -> None:
    assert [fault for rule in RULES[name] for fault in rule(services(name))] == []


@pytest.mark.parametrize(("name", "service", "change"), PLANTED)
def test_a_planted_fault_in_a_compose_file_is_found(name: str, service: str, change: dict[str, Any]) -> None:
    planted = copy.deepcopy(services(name))
    planted[service] |= change
    assert [fault for rule in RULES[name] for fault in rule(planted)]


def test_a_gpu_changes_the_agents_devices_and_nothing_else() -> None:
    assert list(services(GPU)) == ["agent"]
    assert list(services(GPU)["agent"]) == ["deploy"]
    assert list(services(GPU)["agent"]["deploy"]["resources"]) == ["reservations"]


def test_our_own_image_is_this_version() -> None:
    images = {service["image"] for name in RULES for service in services(name).values()}
    assert {image for image in images if image.startswith("fedqc")} == {f"fedqc:{VERSION}"}


def outside_the_schema(document: dict[str, Any]) -> str:
    """What the schema of the compose specification, as check-jsonschema has it, says of a compose file; "" if
    it is one.
    """
    jsonschema = pytest.importorskip("jsonschema", reason="check-jsonschema is not installed: make setup")
    schemas = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    schema = json.loads((schemas / "compose-spec.json").read_text(encoding="utf-8"))
    validator = jsonschema.validators.validator_for(schema)
    error = next(validator(schema).iter_errors(document), None)
    return "" if error is None else str(error.message)


@pytest.mark.parametrize("name", [COORDINATOR, SITE, GPU])
def test_the_compose_files_are_of_the_compose_specification(name: str) -> None:
    assert outside_the_schema(compose(name)) == ""


@pytest.mark.parametrize(
    "change",
    [{"cap-drop": ["ALL"]}, {"mem_limit": ["8g"]}, {"restart": False}, {"healthcheck": {"every": "30s"}}],
)
def test_a_key_that_the_specification_does_not_have_is_found(change: dict[str, Any]) -> None:
    planted = compose(SITE)
    planted["services"]["node"] |= change
    assert outside_the_schema(planted)


# ---- commands: what the files and the pages tell people to type exists


def parse(words: list[str]) -> None:
    """Parse the words after `fedqc` as it would, without doing anything.

    Raises:
        click.UsageError: there is no such command, option or argument.
    """
    group, *rest = words
    if group in ("--help", "--version"):
        return
    if group not in COMMANDS:
        raise click.UsageError(f"no command {group!r}")
    module, _, attribute = COMMANDS[group][0].partition(":")
    try:
        command = typer.main.get_command(getattr(importlib.import_module(module), attribute))
    except ModuleNotFoundError as missing:
        pytest.skip(f"{missing.name} is not written yet")
    context = click.Context(command, info_name=group)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(context, rest[0])
        if found is None:
            raise click.UsageError(f"no command {group} {rest[0]}")
        command, rest = found, rest[1:]
    if rest != ["--help"]:
        command.make_context(command.name, list(rest))


def fedqc_commands() -> Iterator[tuple[str, list[str]]]:
    """Every `fedqc` command in the compose files."""
    for name in RULES:
        for service, found in services(name).items():
            if found["image"].startswith("fedqc"):
                yield f"{name} {service}", found["command"]
            if found.get("healthcheck", {}).get("test", [])[1:2] == ["fedqc"]:
                yield f"{name} {service} healthcheck", found["healthcheck"]["test"][2:]


@pytest.mark.parametrize(
    ("where", "words"), list(fedqc_commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_command_in_a_compose_file_is_one_of_fedqcs(where: str, words: list[str]) -> None:
    parse(words)


CALLED = re.compile(r"(?:(?:^|/|\bcoordinator )fedqc|\bdesk)\s+(\S.*)")


def typed_commands() -> Iterator[str]:
    """What follows `fedqc`, or the container it runs in, on each line of a code block of the deployment
    pages.
    """
    for page in (ROOT / "docs" / "deploy.md", DOCKER / "README.md"):
        for language, block in re.findall(
            r"^```([a-z]*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        ):
            if language == "text":  # what a terminal answered
                continue
            for line in block.replace("\\\n", " ").splitlines():
                if called := CALLED.search(re.sub(r"(^|\s)#.*", "", line)):
                    yield called[1]


def test_the_deployment_pages_type_commands() -> None:
    assert len(set(typed_commands())) > 20


@pytest.mark.parametrize("line", sorted(set(typed_commands())))
def test_every_command_on_the_deployment_pages_is_one_of_fedqcs(line: str) -> None:
    parse(shlex.split(line))


@pytest.mark.parametrize(
    "words", [["federal", "init"], ["run", "begin"], ["run", "watch"], ["run", "list", "--loudly"]]
)
def test_a_command_that_does_not_exist_is_found(words: list[str]) -> None:
    with pytest.raises(click.UsageError):
        parse(words)


# ---- the Dockerfile


@lru_cache
def dockerfile() -> str:
    return (DOCKER / "Dockerfile").read_text(encoding="utf-8")


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, the rest), continuation lines joined, comments dropped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [
        (word.upper(), rest.strip())
        for word, _, rest in (line.strip().partition(" ") for line in joined)
        if word
    ]


def lint(text: str) -> Iterator[str]:
    """A few rules; hadolint knows more, where it is installed."""
    found = instructions(text)
    last = max(number for number, (word, _) in enumerate(found) if word == "FROM")
    stages = {rest.split()[2] for word, rest in found if word == "FROM" and " AS " in rest}
    users = [rest for word, rest in found[last:] if word == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        yield f"runs as {users[-1:] or 'root'}"
    for word, rest in found:
        if word == "FROM" and not IMAGE.fullmatch(rest.split()[0]):
            yield f"FROM {rest}: not pinned"
        if word in ("ENTRYPOINT", "CMD") and not rest.startswith("["):
            yield f"{word} {rest}: through a shell"
        if word in ("ADD", "SHELL", "ONBUILD", "VOLUME", "EXPOSE"):
            yield f"{word} {rest}: not needed"
        if word == "RUN" and re.search(r"\b(curl|wget|apt|apt-get|chmod|sudo|eval|sh -c)\b|\|", rest):
            yield f"RUN {rest}: fetches or pipes what nothing pins"
        if (
            word == "RUN"
            and re.search(r"\bpip\b.*\binstall\b", rest.replace('", "', " "))
            and not re.search(r"--constraint|\w==\d", rest)
        ):
            yield f"RUN {rest}: versions are not pinned"
        if word in ("ENV", "ARG") and re.search(r"(?i)secret|password|token|api_?key", rest):
            yield f"{word} {rest}: a secret would stay in the image"
        if word == "COPY":
            sources = rest.split()[:-1]
            stage = next((source[7:] for source in sources if source.startswith("--from=")), None)
            if stage is not None and stage not in stages:
                yield f"COPY {rest}: no such stage"
            if stage is None and any(
                source in (".", "./") or not (ROOT / source).exists() for source in sources
            ):
                yield f"COPY {rest}: too much, or not there"


FAULTS = [
    ("USER 49999:49999", "USER root"),
    ("USER 49999:49999\n", ""),
    ("FROM python:3.11.14-slim-bookworm\n", "FROM python:3.11-slim\n"),
    ('ENTRYPOINT ["fedqc"]', "ENTRYPOINT fedqc"),
    ("COPY server/ server/", "COPY . ."),
    ("COPY server/ server/", "COPY sever/ server/"),
    ("COPY server/ server/", "ADD server/ server/"),
    ("torch==2.13.0", "torch"),
    ("--from=install", "--from=instal"),
    ("HOME=/tmp \\", "HOME=/tmp PASSWORD=x \\"),
    ("RUN groupadd", "RUN curl https://example.org/x | sh && groupadd"),
]


def test_the_dockerfile_keeps_our_rules() -> None:
    assert list(lint(dockerfile())) == []


@pytest.mark.parametrize(("text", "fault"), FAULTS)
def test_a_planted_fault_in_the_dockerfile_is_found(text: str, fault: str) -> None:
    assert text in dockerfile()
    assert list(lint(dockerfile().replace(text, fault)))


def test_the_image_is_silent_and_of_this_version() -> None:
    environment = dict(
        re.findall(
            r"(\w+)=(\S+)", " ".join(rest for word, rest in instructions(dockerfile()) if word == "ENV")
        )
    )
    assert SILENT.items() <= environment.items()
    assert f'image.version="{VERSION}"' in dockerfile()
    assert f"fedqc-{VERSION}-" in dockerfile()


def test_the_image_has_the_torch_that_is_tested() -> None:
    pinned = re.search(
        r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert pinned
    assert re.findall(r"torch==(\S+)", dockerfile()) == [pinned[1]]


def test_no_package_index_is_built_in() -> None:
    """Where packages come from is said by whoever builds: by an argument without a default, in the Dockerfile
    and in the compose files.
    """
    indexes = {"TORCH_INDEX", "PIP_INDEX_URL"}
    assert {rest for word, rest in instructions(dockerfile()) if word == "ARG"} == indexes
    assert "://" not in " ".join(rest for _, rest in instructions(dockerfile()))
    built = [service["build"] for name in RULES for service in services(name).values() if "build" in service]
    assert built
    assert all(set(build["args"]) == indexes for build in built)


def test_the_image_is_built_from_what_git_has_and_nothing_else() -> None:
    """No data, key or run folder that lies in the checkout can slip in: everything is left out but what is
    named.
    """
    rules = [
        line
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    kept = {rule[1:].rstrip("/") for rule in rules if rule.startswith("!")}
    copied = {
        source.rstrip("/")
        for word, rest in instructions(dockerfile())
        if word == "COPY"
        for source in rest.split()[:-1]
    }
    assert rules[0] == "*"
    assert kept == {source for source in copied if not source.startswith(("--", "/"))}


# ---- the tools of others, where they are installed


def test_hadolint_finds_nothing() -> None:
    tool = shutil.which("hadolint")
    if tool is None:
        pytest.skip("hadolint is not installed")
    said = subprocess.run(
        [tool, DOCKER / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False
    )
    assert said.returncode == 0, said.stdout


@pytest.mark.parametrize("names", [(COORDINATOR,), (SITE,), (SITE, GPU)])
def test_docker_compose_understands_the_files(names: tuple[str, ...]) -> None:
    """Needs the client's plugin, and no engine."""
    docker = shutil.which("docker")
    if (
        docker is None
        or subprocess.run(
            [docker, "compose", "version"], capture_output=True, timeout=60, check=False
        ).returncode
    ):
        pytest.skip("docker compose is not installed")
    words = [word for name in names for word in ("--file", str(DOCKER / name))]
    command = [docker, "compose", *words, "--profile", "*", "config", "--quiet"]
    said = subprocess.run(
        command,
        env=SETTINGS | {"HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert said.returncode == 0, said.stderr
