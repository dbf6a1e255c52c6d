"""The check that a Ray cluster does not run the commands of anyone who can reach it.

Up to Ray 2.60, a cluster started without ``RAY_AUTH_MODE=token`` does: its job server accepts shell commands.
"""

from __future__ import annotations

import ipaddress
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from can_dist.errors import EnvironmentProblem

TIMEOUT_S = 5


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
    """Return the error of a cluster that anyone can command, or None.

    A cluster without tokens whose addresses are all loopback passes: only this machine's users reach it.
    """
    if not dashboard_url or not is_open(dashboard_url) or is_loopback(gcs_address, dashboard_url):
        return None
    return EnvironmentProblem(
        f"the Ray cluster at {gcs_address} is not authenticated and not on loopback: whoever reaches "
        f"{dashboard_url} runs commands on it;",
        "start every node with RAY_AUTH_MODE=token and the same token (ray get-auth-token --generate), on a private "
        "interface.",
    )
