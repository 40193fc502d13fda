"""The gateway with a certificate of cert-manager's: served, renewed, and never half replaced.

cert-manager does not run here. The files are those that it writes for an ECDSA key that is to stay (`ca.crt`,
`tls.crt`, and `tls.key` in its traditional form), laid out as a kubelet mounts a Secret.
"""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from scope_operator.gateway import face
from scope_operator.gateway.process import Serving, UsersCertificate

from scope.join import JoinString
from scope.model import Kind
from scope.registry.http import HttpRegistry
from tests.unit.registry_conformance import MESH
from tests.unit.test_gateway_process import admin_credential, config_in, serve

Key = ec.EllipticCurvePrivateKey
NOW = datetime.datetime.now(datetime.UTC)


class Issuer:
    """A CA of one's own, as an Issuer of the type `ca` is."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ours")])
        self.certificate = self._signed(
            self._name, self.key, x509.BasicConstraints(ca=True, path_length=None), serial=1
        )

    def issue(self, key: Key, *, serial: int) -> x509.Certificate:
        """A leaf for the loopback address; cert-manager's have an empty subject."""
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
        return self._signed(x509.Name([]), key, names, serial=serial)

    def _signed(
        self, subject: x509.Name, key: Key, extension: x509.ExtensionType, *, serial: int
    ) -> x509.Certificate:
        builder = x509.CertificateBuilder(self._name, subject, key.public_key(), serial)
        builder = builder.not_valid_before(NOW - datetime.timedelta(hours=1))
        builder = builder.not_valid_after(NOW + datetime.timedelta(days=90))
        return builder.add_extension(extension, critical=False).sign(self.key, hashes.SHA256())


class MountedSecret:
    """A Secret in a pod: all files change at once, when the kubelet moves one link."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._versions = 0
        directory.mkdir()

    def write(self, issuer: Issuer, leaf: x509.Certificate, key: Key) -> None:
        """What cert-manager writes at an issuance or a renewal."""
        self._versions += 1
        version = self.directory / f"..{self._versions}"
        version.mkdir()
        (version / "ca.crt").write_bytes(issuer.certificate.public_bytes(Encoding.PEM))
        (version / "tls.crt").write_bytes(leaf.public_bytes(Encoding.PEM))
        (version / "tls.key").write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
        )
        data = self.directory / "..data"
        moving = self.directory / "..data_tmp"
        moving.symlink_to(version.name)
        moving.replace(data)
        for name in ("ca.crt", "tls.crt", "tls.key"):
            link = self.directory / name
            if not link.is_symlink():
                link.symlink_to(f"..data/{name}")

    def certificate(self, *, pinned: bool) -> UsersCertificate:
        """What the chart tells the operator."""
        return UsersCertificate(self.directory / "tls.crt", self.directory / "tls.key", pinned=pinned)


def shown(running: Serving, authority: Path) -> int:
    """The serial number of the certificate that a client gets who trusts that CA. Raises ssl.SSLError."""
    context = ssl.create_default_context(cafile=str(authority))
    host, port = running.url.removeprefix("https://").rsplit(":", 1)
    with (
        socket.create_connection((host, int(port)), timeout=30) as connection,
        context.wrap_socket(connection, server_hostname=host) as secured,
    ):
        encoded = secured.getpeercert(binary_form=True)
    assert encoded is not None
    return x509.load_der_x509_certificate(encoded).serial_number


def test_a_certificate_of_cert_manager_is_served_and_its_renewal_too_without_another_join_string(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(face, "RENEW_SECONDS", 0.05)
    issuer, key = Issuer(), ec.generate_private_key(ec.SECP256R1())
    secret = MountedSecret(tmp_path / "scope-tls")
    secret.write(issuer, issuer.issue(key, serial=2), key)
    authority = secret.directory / "ca.crt"
    config = replace(config_in(tmp_path / "data"), certificate=secret.certificate(pinned=True))

    async def body(running: Serving, admin: HttpRegistry) -> None:
        async def shows(serial: int) -> None:
            while await asyncio.to_thread(shown, running, authority) != serial:  # noqa: ASYNC110 - none is told
                await asyncio.sleep(0.01)

        await shows(2)
        await admin.create(MESH)
        pin = JoinString.parse(await admin.create_token("home")).pin
        assert pin == running.pin

        secret.write(issuer, issuer.issue(key, serial=3), key)
        await shows(3)
        assert JoinString.parse(await admin.create_token("home")).pin == pin
        async with HttpRegistry(running.url, pin=pin, credential=admin_credential(config.data)) as another:
            assert [mesh.meta.name for mesh in (await another.list(Kind.MESH)).resources] == ["home"]

        # A pair that does not belong together, as after a Secret was edited by hand, is not taken.
        secret.write(issuer, issuer.issue(ec.generate_private_key(ec.SECP256R1()), serial=4), key)
        while "certificate.unusable" not in caplog.text:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
        assert await asyncio.to_thread(shown, running, authority) == 3

    serve(body, config)


def test_a_certificate_of_an_authority_that_all_trust_is_not_pinned(tmp_path: Path) -> None:
    issuer, key = Issuer(), ec.generate_private_key(ec.SECP256R1())
    secret = MountedSecret(tmp_path / "scope-tls")
    secret.write(issuer, issuer.issue(key, serial=2), key)

    async def body(running: Serving, _: HttpRegistry) -> None:
        assert running.pin is None
        assert await asyncio.to_thread(shown, running, secret.directory / "ca.crt") == 2

    serve(body, replace(config_in(tmp_path / "data"), certificate=secret.certificate(pinned=False)))
