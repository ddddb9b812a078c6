"""The image of `docker/` without an engine: built by Debian's buildah on a base that debootstrap makes, and
the services of the compose files started in it, confined as an engine would.

As in Docker: the user, the read-only image, tmpfs, mounts, no capabilities, no new privileges, no network for
`network_mode: none`. Not as in Docker: no limits on memory and processes, no init, no restarts; every other
network is the machine's own, process numbers are shared, and the base has Debian's Python in place of the
official image's.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from tests.helpers.command_line import ROOT

DOCKER = ROOT / "docker"
MIRROR = os.environ.get("FEDQC_DEBIAN_MIRROR", "")
"""Where debootstrap takes Debian from; its own default if empty."""
NEEDED = ("buildah", "debootstrap", "unshare", "setpriv", "ip")
BASE_PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
BUILD_LIMIT_S = 1800.0


def why_not() -> str:
    """Why this machine cannot build the image; "" if it can."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return "" if os.geteuid() == 0 else "only root can make a base with debootstrap"


def compose(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text(encoding="utf-8"))
    return found


def base() -> str:
    """What every stage of the Dockerfile begins FROM."""
    (tag,) = set(
        re.findall(r"^FROM (\S+)", (DOCKER / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    return tag


def pip_settings(folder: Path) -> list[str]:
    """This machine's configuration of pip, for a build: words for buildah that mount it and what it names."""
    said = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    values: dict[str, str] = {}
    for line in said.stdout.splitlines():
        key, _, value = line.partition("=")
        values[key.rpartition(".")[2]] = str(ast.literal_eval(value))
    config = folder / "pip.conf"
    lines = [f"{key} = {' '.join(value.split())}" for key, value in sorted(values.items())]
    config.write_text("\n".join(["[global]", *lines, ""]), encoding="utf-8")
    paths = {Path("/etc/pip.conf"): config}
    for word in " ".join(values.values()).split():
        if word.startswith("file://"):  # an index: its files lie beside its pages
            path = Path(urlsplit(word).path).parent
            paths[path] = path
        elif word.startswith("/") and Path(word).exists():
            paths[Path(word)] = Path(word)
    return [
        word for target, source in sorted(paths.items()) for word in ("--volume", f"{source}:{target}:ro")
    ]


class Images:
    """A store of images and containers in `folder`, removed by `remove`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tmpfs = 0
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def program(self) -> list[str]:
        store = ["--root", str(self.folder / "storage"), "--runroot", str(self.folder / "state")]
        return ["buildah", "--storage-driver", "vfs", *store]

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"TMPDIR": str(self.folder)}

    def buildah(self, *words: object, limit_s: float = BUILD_LIMIT_S) -> str:
        """The last line that buildah prints; an AssertionError with all of it if it fails."""
        command = [*self.program, *map(str, words)]
        said = subprocess.run(
            command, capture_output=True, text=True, env=self.environment, timeout=limit_s, check=False
        )
        assert said.returncode == 0, f"{shlex.join(command)}\n{said.stdout[-4000:]}\n{said.stderr[-4000:]}"
        return said.stdout.strip().rpartition("\n")[2]

    def remove(self) -> None:
        """Its folder: nothing of it is mounted elsewhere, so buildah need not be asked."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- building

    def make_base(self) -> None:
        """The image that the Dockerfile begins FROM: the smallest Debian, with Python and pip."""
        root = self.folder / "debian"
        command = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "debootstrap",
            "--variant=minbase",
            f"--include={BASE_PACKAGES}",
            "bookworm",
            str(root),
        ]
        said = subprocess.run(
            [*command, *([MIRROR] if MIRROR else [])],
            capture_output=True,
            text=True,
            timeout=BUILD_LIMIT_S,
            check=False,
        )
        assert said.returncode == 0, (
            f"FEDQC_DEBIAN_MIRROR={MIRROR}\n{said.stdout[-4000:]}\n{said.stderr[-4000:]}"
        )
        (root / "usr/bin/python").symlink_to("python3")
        for marker in root.glob(
            "usr/lib/python3*/EXTERNALLY-MANAGED"
        ):  # Debian's pip would refuse, the official does not
            marker.unlink()
        for kept in (*root.glob("var/cache/apt/**/*"), *root.glob("var/lib/apt/lists/**/*")):
            if kept.is_file():
                kept.unlink()
        container = self.buildah("from", "scratch")
        self.buildah("add", container, root, "/")
        self.buildah("commit", container, f"docker.io/library/{base()}")
        self.buildah("rm", container)
        shutil.rmtree(root)

    def build(self, tag: str) -> None:
        """Build the Dockerfile as it is, with this machine's pip."""
        words = ["--isolation", "chroot", "--pull-never", "--format", "docker", *pip_settings(self.folder)]
        self.buildah("bud", *words, "--file", DOCKER / "Dockerfile", "--tag", tag, ROOT)

    # ---- running

    def container(self, tag: str) -> str:
        """A container of an image, whose files `root` names."""
        return self.buildah("from", "--pull-never", tag)

    def root(self, container: str) -> Path:
        return Path(self.buildah("mount", container))

    def in_image(self, container: str, *words: str, user: str = "49999:49999") -> str:
        """What a command says in a container, with nothing mounted and nothing read-only."""
        command = [*self.program, "run", "--isolation", "chroot", "--user", user, container, "--", *words]
        said = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=600,
            check=False,
        )
        assert said.returncode == 0, f"{shlex.join(command)}\n{said.stdout}\n{said.stderr}"
        return said.stdout

    def command(self, container: str, service: dict[str, Any], words: Sequence[str]) -> list[str]:
        """What starts `words` in a container, confined as its service in a compose file says.

        Args:
            service: its variables filled in, each of its folders there.
        """
        root = self.root(container)
        lines = [f"mount --bind {root} {root}"]
        offline = service.get("network_mode") == "none"
        if offline:
            lines.append("ip link set lo up")
        volumes = [
            f"{volume['source']}:{volume['target']}:{'ro' if volume.get('read_only') else 'rw'}"
            for volume in service.get("volumes", [])
        ]
        for tmpfs in service.get("tmpfs", []):
            target, _, options = tmpfs.partition(":")
            self._tmpfs += 1
            memory = self.folder / f"tmpfs-{self._tmpfs}"
            memory.mkdir()
            lines.append(f"mount -t tmpfs -o {options} tmpfs {memory}")
            volumes.append(f"{memory}:{target}")
        for source, target, *_ in (volume.split(":") for volume in volumes):
            inside = root / target.lstrip("/")
            (inside if Path(source).is_dir() else inside.parent).mkdir(parents=True, exist_ok=True)
            if Path(source).is_file():
                inside.touch()
        if service.get("read_only"):  # but for root's /run, where buildah puts a file of its own
            lines += [f"mount -t tmpfs -o mode=755 tmpfs {root}/run", f"mount -o remount,bind,ro {root}"]
        run = [*self.program, "run", "--isolation", "chroot", "--user", service["user"]]
        run += [word for what in service.get("cap_drop", []) for word in ("--cap-drop", what)]
        run += [word for volume in volumes for word in ("--volume", volume)]
        environment = service.get("environment", {})
        if isinstance(environment, dict):
            run += [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
        if "working_dir" in service:
            run += ["--workingdir", service["working_dir"]]
        prefix = ["setpriv", "--no-new-privs"] if service.get("security_opt") else []
        lines += [
            f"ulimit -c {service['ulimits']['core']}",
            f"exec {shlex.join([*prefix, *run, container, '--', *words])}",
        ]
        namespaces = ["--mount", "--propagation", "private"] + (["--net"] if offline else [])
        return ["unshare", *namespaces, "sh", "-ec", "\n".join(lines)]
