"""The check that a Ray cluster does not run the commands of anyone who can reach it.

Up to Ray 2.60, a cluster started without ``RAY_AUTH_MODE=token`` does: its head accepts any client, and its job server
shell commands.
"""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from can_dist.errors import EnvironmentProblem

REMEDY = (
    "start every node with RAY_AUTH_MODE=token and the same token (ray get-auth-token --generate), on a private "
    "interface."
)
TIMEOUT_S = 5
STRANGER_TIMEOUT_S = 30
REFUSED = 3
"""Exit code of a stranger who was asked for a token."""
STRANGER = f"""
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1])
except AuthenticationError:
    sys.exit({REFUSED})
"""


def takes_strangers(gcs_address: str) -> bool | None:
    """Connect to a head in a process without a token: True when it is let in, False when refused, None if unclear."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    try:
        stranger = subprocess.run(
            [sys.executable, "-I", "-c", STRANGER, gcs_address],
            env=environment | {"RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            timeout=STRANGER_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return {0: True, REFUSED: False}.get(stranger.returncode)


def is_open(dashboard_url: str) -> bool | None:
    """Request the job list without a token: True when the server answers, False when it refuses, None without one."""
    address = dashboard_url if "://" in dashboard_url else f"http://{dashboard_url}"
    # never through a proxy: this address itself must answer
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{address.rstrip('/')}/api/jobs/", timeout=TIMEOUT_S) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError as error:
        return False if error.code in (401, 403) else None
    except OSError:
        return None


def is_loopback(*addresses: str) -> bool:
    """Return whether every address (``host:port`` or URL) is reachable from this machine only."""
    hosts = [urlsplit(a if "://" in a else f"//{a}").hostname or "" for a in addresses]
    return all(host == "localhost" or _is_loopback_ip(host) for host in hosts)


def _is_loopback_ip(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def exposure(gcs_address: str, dashboard_url: str) -> EnvironmentProblem | None:
    """Return the error of a cluster that anyone can command, or of which nobody can tell, or None.

    A cluster without tokens whose addresses are all loopback passes: only this machine's users reach it.
    """
    addresses = [gcs_address, *([dashboard_url] if dashboard_url else [])]
    if is_loopback(*addresses):
        return None
    open_head = takes_strangers(gcs_address)
    if open_head or (dashboard_url and is_open(dashboard_url)):
        reached = gcs_address if open_head else dashboard_url
        return EnvironmentProblem(
            f"the Ray cluster at {gcs_address} is not authenticated and not on loopback: whoever reaches "
            f"{reached} runs commands on it;",
            REMEDY,
        )
    if open_head is None:
        return EnvironmentProblem(
            f"whether the Ray cluster at {gcs_address} refuses strangers could not be determined;", REMEDY
        )
    return None
