"""Isolate a hospital's two processes: the agent from the network, the node from the data.

Each process calls this before it loads anything else: the agent gives up the network (`isolate_network`), the
node the files (`confine_files`). Neither the process nor any child can undo that. Both must come before the
first thread, because Linux applies them to the calling thread and what it starts; numpy and torch start
threads when they are imported, so `as_first_thing` starts the process again if that has happened.

Success of a system call is not taken as proof: the isolation is tested afterwards, and the result reported is
that of the test. Standard library and system calls only (unshare(2), capset(2), landlock(7)).
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import FedqcError
from common.terminal import print

NOT_ISOLATED = "NOT ISOLATED: "

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_NO_NEW_PRIVS = 38
_WAYS_OUT = {12, 13, 16, 17, 19, 21, 27, 38, 39}
"""With which root could walk around a wall: net_admin, net_raw, sys_module, sys_rawio, sys_ptrace, sys_admin,
mknod, perfmon, bpf.
"""

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_VERSION, _LANDLOCK_PATH_BENEATH = 1, 1
_NEWEST_ABI = 7
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_OF_A_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_TO_READ = _EXECUTE | _READ_FILE | _READ_DIR
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""ABI that brought them: all rights up to there. 1: thirteen; 2: moving between folders; 3: truncation; 5:
device ioctls.
"""
_SCOPES = 0b11  # ABI 6: abstract unix sockets and signals stay inside

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """Whether a wall holds, in one plain sentence that may be shown to an operator."""

    holds: bool
    how: str
    hint: str = ""


def isolate_network() -> Isolation:
    """Take this process and all its children to a network of their own in which there is nothing: one
    loopback interface, down.

    Covered: IPv4 and IPv6 to any address, this machine's own included; raw and packet sockets; abstract unix
        sockets; netlink about the
    host's interfaces. Not covered: unix sockets with a path (how the agent is asked at all: what may be
    reached is a matter of file permissions), files and pipes shared with other processes, and sockets that
    were open before.

    As root: a network namespace, and the capabilities that lead back out are given up. Otherwise a user
    namespace with this user in it, and every capability in it is given up. Where neither is allowed, but the
    process has no network already (container without one, systemd's PrivateNetwork=), that is enough.

    Must be called before there are threads.
    """
    if not _reachable():
        return Isolation(holds=True, how="already without a network")
    if threads() > 1:
        return _failure(f"requested too late, {threads()} threads are running")
    # a refusal half way (AppArmor) would leave this process as nobody
    if error := _in_a_child(_leave_the_network):
        if not _ways_to_others():
            return Isolation(holds=True, how="already without a network, but for its own loopback")
        hint = "run it as systemd does (PrivateNetwork=yes), in a container without a network, or as root"
        if os.geteuid() != 0:
            hint += (
                "; or allow unprivileged user namespaces "
                "(kernel.apparmor_restrict_unprivileged_userns, user.max_user_namespaces)"
            )
        return _failure(f"the system refuses a network namespace ({os.strerror(error)})", hint)
    _leave_the_network()
    if found := _reachable():
        return _failure(f"in its own network namespace there is still {found}")
    return Isolation(holds=True, how="own network namespace, nothing to reach in it")


def confine_files(read: Sequence[Path], write: Sequence[Path]) -> Isolation:
    """Leave this process and all its children only these files: nothing else can be opened, listed, changed,
    made or executed.

    Args:
        read: files and trees that may be read and executed; those that do not exist are passed over.
        write: files and trees in which everything is allowed.
    Where the kernel can, signals and abstract unix sockets to processes outside are denied too (Linux 6.12).
    Not covered: what was open before; that a path exists (stat); connecting to unix sockets with a path,
    which file permissions govern; the network.

    Landlock (Linux 5.13, enabled at boot) is applied to the calling thread and what it starts: must be called
    before there are threads.
    """
    abi = _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(_LANDLOCK_VERSION))
    if abi < 1:
        hint = (
            "Linux 5.13 or newer with landlock among the security modules (lsm= on the kernel's command line)"
        )
        return _failure(
            f"this kernel has no Landlock ({os.strerror(ctypes.get_errno())}): the node could read the data",
            hint,
        )
    if threads() > 1:
        return _failure(f"requested too late, {threads()} threads are running")
    abi = min(abi, _NEWEST_ABI)
    everything = next(rights for since, rights in sorted(_FILE_RIGHTS.items(), reverse=True) if since <= abi)
    wanted = struct.pack("QQQ", everything, 0, _SCOPES)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    rules = _libc.syscall(_LANDLOCK_CREATE, wanted, ctypes.c_size_t(len(wanted)), ctypes.c_uint32(0))
    if rules < 0:
        return _failure(f"Landlock refuses the rules ({os.strerror(ctypes.get_errno())})")
    try:
        for paths, rights in ((read, everything & _TO_READ), (write, everything)):
            for path in paths:
                _allow(rules, path, rights)
        _give_up_capabilities(_WAYS_OUT)
        if _libc.syscall(_LANDLOCK_RESTRICT, ctypes.c_int(rules), ctypes.c_uint32(0)) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as error:
        return _failure(f"Landlock could not be applied ({error.strerror})")
    finally:
        os.close(rules)
    try:
        os.listdir("/")
    except PermissionError:
        return Isolation(holds=True, how=f"files confined by Landlock (ABI {abi})")
    return _failure("Landlock was applied, and yet the root folder can be listed")


def threads() -> int:
    """How many threads this process has."""
    return len(os.listdir("/proc/self/task"))


def as_first_thing(module: str, site: Path, *, require_isolation: bool) -> None:
    """Where threads are running already, become a new process of `module`, with the same number, that has
    only begun.
    """
    if threads() > 1:
        command = [sys.executable, "-P", "-m", module, str(site)] + (
            ["--require-isolation"] if require_isolation else []
        )
        os.execv(sys.executable, command)


def main(run: Callable[..., int]) -> int:
    """Be one of the two processes: SITE [--require-isolation]. Returns the exit status."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("site", type=Path)
    parser.add_argument("--require-isolation", action="store_true")
    words = parser.parse_args()
    try:
        return run(words.site, require_isolation=words.require_isolation)
    except FedqcError as error:
        print(f"fedqc: error [{error.code}]: {' '.join(error.message.split())}", file=sys.stderr)
        if error.hint:
            print(f"fedqc: hint: {error.hint}", file=sys.stderr)
        return error.exit_status


def _failure(why: str, hint: str = "") -> Isolation:
    return Isolation(holds=False, how=NOT_ISOLATED + why, hint=hint)


def _reachable() -> str:
    """What of a network there is, "" if nothing: an interface that leads out, a loopback that is up, an
    address with a way to it.
    """
    if others := _ways_to_others():
        return others
    for family, address in (
        (socket.AF_INET, "127.0.0.1"),
        (socket.AF_INET, "192.0.2.1"),  # RFC 5737 and RFC 3849: addresses of nobody
        (socket.AF_INET6, "::1"),
        (socket.AF_INET6, "2001:db8::1"),
    ):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)
                error = probe.connect_ex((address, 9))
        except OSError as refused:  # the family itself is denied
            error = refused.errno or errno.EAFNOSUPPORT
        if error not in (
            errno.ENETUNREACH,
            errno.EADDRNOTAVAIL,
            errno.EAFNOSUPPORT,
            errno.EPERM,
            errno.EACCES,
        ):
            return f"a way to {address}"
    return ""


def _ways_to_others() -> str:
    """Interfaces that lead out of the machine or namespace and are up, "" if there are none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            asked = struct.pack("16sH22x", name.encode(), 0)
            flags = struct.unpack("16sH22x", fcntl.ioctl(any_socket, 0x8913, asked))[1]  # SIOCGIFFLAGS
            is_up, is_loopback = flags & 0x1, flags & 0x8
            if is_up and not is_loopback:
                return f"the interface {name}"
    return ""


def _leave_the_network() -> None:
    """Raises OSError where the system refuses; this process may then be in a user namespace in which it is
    nobody.
    """
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare(_CLONE_NEWNET if uid == 0 else _CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if uid != 0:  # the same user and group as outside, and nobody else
        for file, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            Path("/proc/self", file).write_text(text, encoding="ascii")
    _give_up_capabilities(_WAYS_OUT if uid == 0 else set(range(64)))


def _in_a_child(work: Callable[[], None]) -> int:
    """Try `work` where it leaves no traces: 0, or the number of the error it raised."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or errno.EIO)
        finally:
            os._exit(errno.EIO)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _give_up_capabilities(which: set[int]) -> None:
    """Give up these capabilities for good: no program that is executed later brings them back. Raises
    OSError.
    """
    status = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    )
    left = int(status["CapPrm"], 16) & ~sum(1 << capability for capability in which)
    header = struct.pack("Ii", 0x20080522, 0)  # version 3, this thread
    low, high = left & 0xFFFFFFFF, left >> 32
    data = struct.pack("6I", low, low, 0, high, high, 0)  # effective, permitted, inheritable
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 or _libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _allow(rules: int, path: Path, rights: int) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # what cannot be reached now needs no permission
    try:
        if not os.path.isdir(f"/proc/self/fd/{opened}"):
            rights &= _OF_A_FILE
        rule = struct.pack("=Qi", rights, opened)
        if (
            _libc.syscall(
                _LANDLOCK_ADD,
                ctypes.c_int(rules),
                ctypes.c_int(_LANDLOCK_PATH_BENEATH),
                rule,
                ctypes.c_uint32(0),
            )
            != 0
        ):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(opened)
