"""How a cluster's dashboard is addressed, and what it is told about who asks.

The token comes from where Ray's own programs look for it: ``RAY_AUTH_TOKEN``, the file
``RAY_AUTH_TOKEN_PATH``, or ``~/.ray/auth_token``
(https://docs.ray.io/en/latest/ray-security/token-auth.html).
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from sbi_dist.errors import InputError

__all__ = ["dashboard_url", "extra_headers", "find_token", "shown"]

_MOUNTED = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_EXAMPLE = "http://HOST:8265, the address of the cluster's dashboard"


def dashboard_url(address: str | None) -> str:
    """The dashboard's URL without a slash at its end.

    Without an address it is the environment's ``RAY_API_SERVER_ADDRESS``, or ``RAY_ADDRESS`` where
    that is a URL.

    Raises:
        InputError: none is given, or it is another kind of address; says which.
    """
    if not address:
        there = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", "")
        if "://" not in there or there.startswith("ray://"):
            raise InputError(f"--address is missing; give {_EXAMPLE}")
        address = there
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:  # which may quote a password
        raise InputError(
            f"--address {shown(address)!r} has a host or a port that can't be read; give {_EXAMPLE}"
        ) from None
    if parts.scheme == "ray":
        raise InputError(
            f"--address {shown(address)!r} is where Ray's client connects to; jobs are submitted "
            f"to {_EXAMPLE}" + (f" (perhaps http://{host}:8265)" if host else "")
        )
    if parts.scheme not in ("http", "https"):
        what = "has no http:// before it"
        if port is not None and port != 8265:
            what = "is where the processes of a cluster connect to"
        elif parts.scheme:
            what = f"is a {parts.scheme}: URL"
        raise InputError(
            f"--address {shown(address)!r} {what}; jobs are submitted to {_EXAMPLE}"
            + (f" (perhaps http://{host}:8265)" if host and host not in ("auto", "local") else "")
        )
    if host is None or parts.query or parts.fragment:
        raise InputError(f"--address {shown(address)!r} is no such URL; give {_EXAMPLE}")
    return address.rstrip("/")


def shown(url: str) -> str:
    """A URL as it may be printed: without the name and password that it may hold."""
    scheme, separator, rest = url.rpartition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def find_token() -> tuple[str, str] | None:
    """The token that Ray's own programs would send, and where it is from.

    Raises:
        InputError: the file that ``RAY_AUTH_TOKEN_PATH`` names can't be read or is empty, or what
            is found can't be sent; says where it is from, and never what it is.
    """
    found = _token()
    if found is not None and not _sendable(found[0]):
        raise InputError(
            f"the token of {found[1]} has more than one line, or characters that are not ASCII; "
            "put the cluster's token there, and nothing else"
        )
    return found


def _token() -> tuple[str, str] | None:
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if token:
        return token, "the variable RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named:
        token = _content(Path(named).expanduser())
        if not token:
            raise InputError(
                f"RAY_AUTH_TOKEN_PATH is {named!r}, which can't be read or is empty; name a file "
                "with the cluster's token"
            )
        return token, f"the file {named}"
    places = [Path("~/.ray/auth_token").expanduser()]
    if os.environ.get("RAY_ENABLE_K8S_TOKEN_AUTH", "").lower() in ("1", "true"):
        places.insert(0, _MOUNTED)
    for place in places:
        if token := _content(place):
            return token, f"the file {place}"
    return None


def _content(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _sendable(value: str) -> bool:
    """Whether a header can have this value; errors about it further on would quote it."""
    return value.isascii() and value.isprintable() and value == value.strip()


def extra_headers() -> dict[str, str]:
    """Headers for a proxy before the dashboard: ``RAY_JOB_HEADERS``, as for Ray's own programs.

    Raises:
        InputError: that is no mapping of names to texts, or one of them can't be sent; names the
            header, and never its value.
    """
    text = os.environ.get("RAY_JOB_HEADERS")
    if not text:
        return {}
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise InputError(
            'RAY_JOB_HEADERS must be a JSON object of texts, such as {"Cookie": "..."}'
        )
    for name, value in found.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name) or not _sendable(value):
            raise InputError(
                f"RAY_JOB_HEADERS: {name!r} is no header that can be sent; names are letters, "
                "digits and hyphens, and values one line of ASCII without spaces around it"
            )
    return found
