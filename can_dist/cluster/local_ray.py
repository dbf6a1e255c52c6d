"""A Ray of this machine's own that no other user of the machine can command or read.

Ray 2.60 writes its token readable by everybody, listens on every interface and opens its session directory to all.
Before a local start the token is this user's alone, every server listens on the loopback interface, and the sessions
lie in a directory that nobody else can enter.
"""

from __future__ import annotations

import functools
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from can_dist.cluster.ray_directory import session_directory
from can_dist.errors import EnvironmentProblem

MODE = "RAY_AUTH_MODE"
TOKEN = "RAY_AUTH_TOKEN"
TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
ALL_INTERFACES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch between the machine's address and the loopback one; on Linux it is on unless set to 0."""


def token_path() -> Path | None:
    """Return the file that Ray reads its token from, or None where the token itself is in the environment."""
    if os.environ.get(TOKEN):
        return None
    chosen = os.environ.get(TOKEN_PATH)
    return Path(chosen).expanduser() if chosen else Path.home() / ".ray" / "auth_token"


def token_exposure(path: Path) -> str:
    """Return why somebody else may know or replace the token in an existing file, or ''."""
    status = path.stat()
    if status.st_uid not in (os.getuid(), 0):
        return f"belongs to another user (id {status.st_uid})"
    if status.st_mode & 0o077:
        return f"has the mode {stat.S_IMODE(status.st_mode):04o}, so others can read or replace it"
    if path.parent.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"lies in {path.parent}, which others can write"
    return ""


def private_directory() -> str:
    """Return the directory for the sessions of a local Ray that nobody else can command.

    Raises:
        EnvironmentProblem: authentication is switched off, the token is another user's, or there is no place for a
            private directory.
    """
    mode = os.environ.get(MODE)
    if mode is not None and mode.lower() != "token":
        raise EnvironmentProblem(
            f"{MODE}={mode}: every user of this machine could then command a local Ray.", f"Unset {MODE}."
        )
    path = token_path()
    if path is not None and path.exists() and path.stat().st_uid not in (os.getuid(), 0):
        raise EnvironmentProblem(
            f"{path}: the token of a local Ray {token_exposure(path)}.", f"Name a file of yours in {TOKEN_PATH}."
        )
    return session_directory()


def make_private() -> str:
    """Prepare the start of a local Ray; return the directory for its sessions.

    A token is made, or the rights of an existing one are narrowed to this user. Servers of this process and of those
    that it starts listen on the loopback interface.

    Raises:
        EnvironmentProblem: as :func:`private_directory`, or the token cannot be written or closed to others.
    """
    directory = private_directory()
    if (path := token_path()) is not None:
        _own_token(path)
    os.environ[ALL_INTERFACES] = "0"
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    listen_on_loopback(True)
    return directory


def listen_on_loopback(only: bool) -> None:
    """Say to the Ray of this process whether its servers listen on the loopback interface alone."""
    import ray._private.ray_constants as constants

    # Ray reads its variable when it is imported, which may be long past
    constants.ENABLE_RAY_CLUSTER = not only


@contextmanager
def own_session() -> Iterator[None]:
    """Start Ray's servers in sessions of their own, and only those that a run needs.

    A signal to the whole group of the driver (a terminal, ``timeout``, systemd, Slurm) is then the driver's to handle,
    and ends no server under it. The kernel still ends them with the driver. The driver asks for no prints and no
    dashboard, and one machine is all the nodes: what serves those is left out.
    """
    from ray._private import parameter, services, utils

    names = {
        services: ("ConsolePopen", "start_api_server"),
        parameter: ("RayParams",),
        utils: ("get_dashboard_dependency_error",),
    }
    theirs = {(place, name): getattr(place, name) for place in names for name in names[place]}
    services.ConsolePopen = functools.partial(services.ConsolePopen, start_new_session=True)
    services.start_api_server = lambda *_, **__: ("", None)  # without a dashboard it has nothing to serve
    parameter.RayParams = functools.partial(parameter.RayParams, include_log_monitor=False, no_monitor=True)
    utils.get_dashboard_dependency_error = lambda: ImportError()  # the node's agent then has its smallest form
    try:
        yield
    finally:
        for (place, name), value in theirs.items():
            setattr(place, name, value)


def _own_token(path: Path) -> None:
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600, exist_ok=False)
            path.write_text(secrets.token_hex(32), encoding="ascii")
        if path.stat().st_uid == os.getuid():
            path.chmod(0o600)
        if path.parent.stat().st_uid == os.getuid():
            path.parent.chmod(stat.S_IMODE(path.parent.stat().st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
        exposed = token_exposure(path)
    except OSError as error:
        raise EnvironmentProblem(
            f"{path}: the token of a local Ray cannot be kept there ({error.strerror}).",
            f"Make the directory yours, or name a file of yours in {TOKEN_PATH}.",
        ) from None
    if exposed:
        raise EnvironmentProblem(
            f"{path}: the token of a local Ray {exposed}.",
            f"Delete it and close its directory to others, or name a file of yours in {TOKEN_PATH}.",
        )
