"""As much of Kubernetes' API server as Ray's autoscaler asks: Ray clusters, and their pods.

It listens in the network of a pod, at 6443, over TLS with a certificate of its own. The account of
the autoscaler may do what the role allows that the operator binds to it (common/rbac.go,
BuildRole): get and list pods, get and patch Ray clusters.
"""

from __future__ import annotations

import json
import re
import secrets
import ssl
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.services.kuberay.network import inside
from tests.services.kuberay.pod import Pod

__all__ = ["PORT", "Api"]

PORT = 6443
Object = dict[str, Any]
_PATH = re.compile(r"/(?:api/v1|apis/ray\.io/v1)/namespaces/[^/]+/(pods|rayclusters)(?:/([^/]+))?")


class Api:
    """The server, running.

    Args:
        host: the pod in whose network it listens.
        folder: for its certificate.
        clusters: Ray clusters by their names; patches change them.
        pods: of a namespace, as they are when asked.

    Attributes:
        environment: what Kubernetes tells every container of it.
        certificate: what clients know it by (``ca.crt``).
    """

    def __init__(
        self, host: Pod, folder: Path, clusters: dict[str, Object], pods: Callable[[], list[Object]]
    ) -> None:
        self._clusters, self._pods = clusters, pods
        self._accounts: dict[str, str] = {}  # by their tokens
        self._bound: set[str] = set()
        self.environment = {
            "KUBERNETES_SERVICE_HOST": host.address,
            "KUBERNETES_SERVICE_PORT": str(PORT),
            "KUBERNETES_SERVICE_PORT_HTTPS": str(PORT),
        }
        certificate, key = folder / "ca.crt", folder / "ca.key"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"]
        command += ["-pkeyopt", "ec_paramgen_curve:P-256", "-subj", "/CN=kubernetes"]
        command += ["-keyout", str(key)]
        command += ["-addext", f"subjectAltName=IP:{host.address}", "-out", str(certificate)]
        subprocess.run(command, check=True, capture_output=True, timeout=30)
        self.certificate = certificate.read_text()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(*api.answer("get", self.path, self._token(), b""))

            def do_PATCH(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self._answer(*api.answer("patch", self.path, self._token(), body))

            def _token(self) -> str:
                return self.headers.get("Authorization", "").removeprefix("Bearer ")

            def _answer(self, status: int, content: Object) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        # A socket stays in the network that it was made in.
        self._server = inside(host.pid, lambda: ThreadingHTTPServer(("", PORT), Handler))
        self._server.daemon_threads = True
        # Not before a connection's own thread begins: one that says nothing would hold up all.
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def token(self, account: str) -> str:
        """A token of a service account."""
        token = secrets.token_urlsafe(32)
        self._accounts[token] = account
        return token

    def bind(self, account: str) -> None:
        """Let an account do what the autoscaler has to."""
        self._bound.add(account)

    def answer(self, verb: str, path: str, token: str, body: bytes) -> tuple[int, Object]:
        """The status and the content of an answer."""
        account = self._accounts.get(token)
        if account not in self._bound:
            return (401, {}) if account is None else (403, {})
        url = urlsplit(path)
        match = _PATH.fullmatch(url.path)
        if match is None:
            return 404, {}
        kind, name = match.groups()
        if kind == "pods" and verb == "get":
            if name is not None:
                found = [each for each in self._pods() if each["metadata"]["name"] == name]
                return (200, found[0]) if found else (404, {})
            (selector,) = parse_qs(url.query)["labelSelector"]
            key, _, value = selector.partition("=")
            items = [each for each in self._pods() if each["metadata"]["labels"].get(key) == value]
            return 200, {"metadata": {"resourceVersion": "1"}, "items": items}
        if kind == "rayclusters" and name in self._clusters:
            cluster = self._clusters[name]
            if verb == "patch":
                for each in json.loads(body):
                    _apply(cluster, each)
            return 200, cluster
        return (405, {}) if name in self._clusters else (404, {})

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _apply(document: Object, operation: Object) -> None:
    """One operation of a JSON patch (RFC 6902), of those that the autoscaler uses."""
    assert operation["op"] in ("replace", "add"), operation
    *parents, last = operation["path"].lstrip("/").split("/")
    place: Any = document
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
    assert isinstance(place, dict), operation
    place[last] = operation["value"]
