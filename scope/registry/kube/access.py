"""Where the API server is, whom to trust, and what to show: read anew when it matters.

A pod's token and certificate authority are files that the kubelet replaces; the token is read for every
request, the authority for every new connection pool. A kubeconfig is read by the Python client for
Kubernetes, which knows certificates, tokens, exec plugins and identity providers.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from scope.model import ConfigError
from scope.registry.port import Unavailable

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
HOST, PORT = "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"
MAX_TOKEN = 64 * 1024  # bytes of a token: far more than any issuer's
REFRESH_SECONDS = 60.0  # a kubeconfig's exec plugin is asked again this often, and answers from its cache


class Access(Protocol):
    """One API server, and who we are to it."""

    @property
    def url(self) -> str:
        """https://HOST:PORT, without a slash at its end."""
        ...

    @property
    def server_name(self) -> str | None:
        """The name that its certificate is to have; None: the URL's."""
        ...

    def tls(self) -> ssl.SSLContext | None:
        """A fresh context; None where the URL is plain http. Raises Unavailable."""
        ...

    async def authorization(self) -> str | None:
        """The header of that name; None where a certificate says who we are. Raises Unavailable."""
        ...


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    """A pod's: `directory` holds `token` and `ca.crt`."""

    url: str
    directory: Path = SERVICE_ACCOUNT
    server_name: str | None = None

    def tls(self) -> ssl.SSLContext | None:
        """A context that trusts the cluster's authority as it is on disk now. Raises Unavailable."""
        return _context(self.directory / "ca.crt")

    async def authorization(self) -> str | None:
        """The token as it is on disk now: the kubelet replaces it before it expires. Raises Unavailable."""
        file = self.directory / "token"
        try:
            token = file.read_bytes()[:MAX_TOKEN].decode("ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise Unavailable(f"cannot read the ServiceAccount token {file}: {error}") from None
        return f"Bearer {token}"


def in_cluster(
    *,
    url: str | None = None,
    directory: Path = SERVICE_ACCOUNT,
    environ: Mapping[str, str] = os.environ,
) -> ServiceAccount:
    """The access of a pod. `url` replaces what the environment says. Raises ConfigError."""
    if url is None:
        host, port = environ.get(HOST, ""), environ.get(PORT, "")
        if not host or not port:
            raise ConfigError(
                f"{HOST} and {PORT} are not set: run in a pod, or name the API server with --api-server"
            )
        url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    if not url.startswith("https://"):
        raise ConfigError(f"an API server's URL starts with https://, not {url!r}")
    return ServiceAccount(url.rstrip("/"), directory)


@dataclass(slots=True)
class Kubeconfig:
    """A context of a kubeconfig, as `from_kubeconfig` read it."""

    configuration: Any  # kubernetes.aio.client.Configuration; the package has no types
    loader: Any  # its KubeConfigLoader
    refreshed: float = field(default_factory=time.monotonic)

    @property
    def url(self) -> str:
        return str(self.configuration.host)

    @property
    def server_name(self) -> str | None:
        return self.configuration.tls_server_name or None

    def tls(self) -> ssl.SSLContext | None:
        """A context with the kubeconfig's authority and client certificate. Raises Unavailable."""
        if not self.url.startswith("https://"):
            return None
        ours = self.configuration
        context = _context(Path(ours.ssl_ca_cert) if ours.ssl_ca_cert else None)
        if ours.cert_file:
            try:
                context.load_cert_chain(ours.cert_file, ours.key_file)
            except OSError as error:
                raise Unavailable(f"cannot use the client certificate {ours.cert_file}: {error}") from None
        if not ours.verify_ssl:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    async def authorization(self) -> str | None:
        """The token, from the kubeconfig's plugin where it names one. Raises Unavailable."""
        if time.monotonic() - self.refreshed > REFRESH_SECONDS:
            self.refreshed = time.monotonic()
            await _load(self.loader, self.configuration)
        token = self.configuration.api_key.get("BearerToken")
        return str(token) if token else None


async def from_kubeconfig(file: Path | None = None, *, context: str | None = None) -> Kubeconfig:
    """The access that `kubectl` would have with that file and context. Raises ConfigError, Unavailable."""
    aio = await asyncio.to_thread(_import_kubernetes)
    configuration = aio.client.Configuration()
    try:
        loader = await aio.config.load_kube_config(
            config_file=str(file) if file is not None else None,
            context=context,
            client_configuration=configuration,
            persist_config=False,
        )
    except aio.config.ConfigException as error:
        name = file if file is not None else "the kubeconfig"
        raise ConfigError(f"{name}: {error}; name another with KUBECONFIG") from None
    return Kubeconfig(configuration, loader)


async def _load(loader: Any, configuration: Any) -> None:
    aio = await asyncio.to_thread(_import_kubernetes)
    try:
        await loader.load_and_set(configuration)
    except aio.config.ConfigException as error:
        raise Unavailable(f"the kubeconfig gives no access any more: {error}") from None


def _import_kubernetes() -> Any:
    import kubernetes.aio as aio  # a second of a core, and 60 MiB: for kubeconfigs alone

    return aio


def _context(authority: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=authority)
    except OSError as error:
        raise Unavailable(
            f"cannot read the API server's certificate authority {authority}: {error}"
        ) from None
    # Python 3.13 asks for key identifiers (RFC 5280, section 4.2.1.1) that clusters' own authorities lack.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context
