"""Two nodes that are one machine, by a real Slurm and by real ssh: for launchers over several nodes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from train_world import free_port

SLURM_PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch")
SSH_PROGRAMS = ("ssh", "sshd", "ssh-keygen", "pdsh")
SYSTEM = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"

SLURM_CONF = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MinJobAge=600
KillWait=60
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs=8 State=UNKNOWN
NodeName=zz-other NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} CPUs=8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
"""


def missing(programs: tuple[str, ...]) -> list[str]:
    """Return which programs are not installed."""
    return [program for program in programs if shutil.which(program, path=SYSTEM) is None]


def _daemon(name: str, *arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.Popen:
    program = shutil.which(name, path=SYSTEM)
    assert program is not None
    return subprocess.Popen(
        [program, *map(str, arguments)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


@contextmanager
def slurm(directory: Path) -> Iterator[dict[str, str]]:
    """Start munge, a controller and two nodes; give the variables that reach them."""
    host = socket.gethostname().partition(".")[0]
    for part in ("munge", "state", f"spool.{host}", "spool.zz-other"):
        (directory / part).mkdir(mode=0o755)
    key = directory / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    munge = {"key-file": key, **{f"{name}-file": directory / "munge" / name for name in ("pid", "log", "seed")}}
    socket_path = directory / "munge" / "socket"
    ports = {name: free_port() for name in ("control_port", "port_1", "port_2")}
    user = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
    conf = directory / "slurm.conf"
    conf.write_text(SLURM_CONF.format(host=host, directory=directory, user=user, **ports))
    env = {**os.environ, "SLURM_CONF": str(conf)}
    options = [f"--{name}={path}" for name, path in munge.items()]
    daemons = [_daemon("munged", "--foreground", "--force", f"--socket={socket_path}", *options)]
    try:
        _until(socket_path.exists, "munged made no socket")
        daemons.append(_daemon("slurmctld", "-D", env=env))
        daemons += [_daemon("slurmd", "-D", "-N", node, env=env) for node in (host, "zz-other")]
        _until(
            lambda: _words(env, "sinfo", "-h", "-t", "idle", "-o", "%D") == ["2"],
            "the two Slurm nodes did not become idle",
        )
        yield {"SLURM_CONF": str(conf)}
    finally:
        subprocess.run(["scancel", "--quiet", f"--user={user}"], env=env, check=False)
        _until(lambda: _words(env, "squeue", "--noheader") == [], "jobs did not end", 120)
        for daemon in reversed(daemons):  # what signs the messages of the others ends last
            daemon.terminate()
            daemon.wait(30)


def _words(env: dict[str, str], *command: str) -> list[str]:
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False).stdout.split()


def _until(happened: Callable[[], bool], message: str, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline, message
        time.sleep(0.2)


@contextmanager
def ssh(directory: Path) -> Iterator[dict[str, str]]:
    """Start an ssh server on loopback; give a PATH whose ``ssh`` reaches it without password, in the tests' home."""
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True)
    port = free_port()
    server = directory / "sshd_config"
    server.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nListenAddress 127.0.0.2\nHostKey {directory}/host_key\n"
        f"AuthorizedKeysFile {directory}/user_key.pub\nPasswordAuthentication no\nUsePAM no\nStrictModes no\n"
        f"PermitRootLogin prohibit-password\nPidFile none\n"
        f"SetEnv HOME={os.environ['HOME']} OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}\n"
    )
    client = directory / "ssh_config"
    client.write_text(
        f"Host *\nPort {port}\nIdentityFile {directory}/user_key\nIdentitiesOnly yes\nBatchMode yes\n"
        f"StrictHostKeyChecking accept-new\nUserKnownHostsFile {directory}/known_hosts\nLogLevel ERROR\n"
    )
    bin_ = directory / "bin"
    bin_.mkdir()
    wrapper = bin_ / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {client} "$@"\n')
    wrapper.chmod(0o755)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # a server of root wants it
    daemon = _daemon("sshd", "-D", "-f", server)

    def reached() -> bool:
        return subprocess.run([wrapper, "127.0.0.2", "true"], capture_output=True, check=False).returncode == 0

    try:
        _until(reached, "no ssh to 127.0.0.2")
        yield {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"}
    finally:
        daemon.terminate()
        daemon.wait(30)
