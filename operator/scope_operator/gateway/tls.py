"""The gateway's certificate: made by itself, or the user's own.

A self-made certificate is trusted by its pin, which join strings carry: the key stays in the data directory
(0600, P-256, which every TLS stack speaks), only the certificate around it is renewed, so the pin never
changes. A renewed certificate reaches new connections without a restart, since a context can be loaded
again. Where the key has to be replaced, the registry vouches for the new one (`scope.vouching`).
"""

from __future__ import annotations

import datetime
import hashlib
import os
import ssl
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from scope.credentials import pin_of
from scope.model import ConfigError, Secret
from scope.vouching import MAX_REPLACED, OID, replaced_by, vouch

VALID_DAYS = 365  # what a browser-minded TLS stack still accepts
RENEW_DAYS = 60  # left when a new one is made: a machine may be off for weeks

KEY_FILE = "tls-key.pem"
CERTIFICATE_FILE = "tls-cert.pem"


@dataclass(frozen=True, slots=True)
class Certificate:
    """Where a certificate and its key are, and its pin."""

    certificate: Path
    key: Path
    pin: bytes


def users_certificate(certificate: Path, key: Path) -> Certificate:
    """The user's own. Raises ConfigError when either file is missing or is not PEM."""
    try:
        loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
        load_pem_private_key(key.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError(
            f"cannot read {error.filename}: {error.strerror}; check --tls-cert and --tls-key"
        ) from None
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{certificate} and {key} must be a PEM certificate (chain) and its PEM key without a "
            f"passphrase: {error}"
        ) from None
    return Certificate(certificate, key, pin_of(loaded.public_bytes(Encoding.DER)))


@dataclass(frozen=True, slots=True)
class Vouching:
    """With what the registry vouches for the key of its gateway, and the pins of the keys it replaces."""

    signing: Secret
    replaced: tuple[bytes, ...] = ()


def self_made(
    directory: Path, hosts: tuple[str, ...], now: datetime.datetime, *, vouching: Vouching | None = None
) -> Certificate:
    """The certificate kept in `directory`, made or renewed when it is missing, near its end, names other
    hosts, or does not vouch as it should.

    `now` carries a time zone. Raises OSError, and ConfigError when the key on disk is damaged.
    """
    key_file, certificate_file = directory / KEY_FILE, directory / CERTIFICATE_FILE
    key = _kept_key(key_file)
    kept = _kept_certificate(certificate_file)
    extension = _extension(key, vouching, kept) if vouching is not None else None
    if (
        kept is None
        or kept.public_key() != key.public_key()
        or _is_due(kept, hosts, now)
        or _vouched(kept) != extension
    ):
        kept = _issue(key, hosts, now, extension)
        write_private(certificate_file, kept.public_bytes(Encoding.PEM))
    return Certificate(certificate_file, key_file, pin_of(kept.public_bytes(Encoding.DER)))


def server_context(certificate: Certificate) -> ssl.SSLContext:
    """A TLS 1.2+ server context. Raises ConfigError when key and certificate do not belong together."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, certificate)
    return context


def load_into(context: ssl.SSLContext, certificate: Certificate) -> None:
    """Serve `certificate` from the next connection on. Raises ConfigError, and serves what it did before."""
    trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # a pair that is refused leaves a context without a key
    _load(trial, certificate)
    _load(context, certificate)


def _load(context: ssl.SSLContext, certificate: Certificate) -> None:
    try:
        context.load_cert_chain(certificate.certificate, certificate.key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{certificate.certificate} and {certificate.key} do not make a TLS server: {error}; "
            "the key must be the certificate's own"
        ) from None


def write_private(path: Path, content: bytes) -> None:
    """Replace `path` atomically with a file of mode 0600, durable before it returns. Raises OSError."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _kept_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The key at `path`; the first time it is made."""
    if not path.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return key
    try:
        loaded = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}): restore it from a backup; or delete it, and another is made, for "
            "which the registry vouches towards its peers"
        ) from None
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{path} is not an elliptic-curve key: give your own pair with --tls-cert and --tls-key"
        )
    return loaded


def _kept_certificate(path: Path) -> x509.Certificate | None:
    """The certificate at `path`, None when there is none that can be read: it can be made anew."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _is_due(certificate: x509.Certificate, hosts: tuple[str, ...], now: datetime.datetime) -> bool:
    """Near its end, from the future (a clock was set back), or for other hosts."""
    ends = certificate.not_valid_after_utc - datetime.timedelta(days=RENEW_DAYS)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return not certificate.not_valid_before_utc <= now < ends or list(names) != _names(hosts)


def _extension(
    key: ec.EllipticCurvePrivateKey, vouching: Vouching, kept: x509.Certificate | None
) -> x509.UnrecognizedExtension:
    """What says whose place the key takes: also that of the certificate that is there, and of its own."""
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    pin = hashlib.sha256(public).digest()
    said = _vouched(kept) if kept is not None else None
    before = [*vouching.replaced, *(replaced_by(said.value) if said is not None else ())]
    if kept is not None:
        before.append(pin_of(kept.public_bytes(Encoding.DER)))
    replaced = [each for each in dict.fromkeys(before) if each != pin][-MAX_REPLACED:]
    content = vouch(pin, replaced, signing=vouching.signing)
    return x509.UnrecognizedExtension(x509.ObjectIdentifier(OID), content)


def _vouched(certificate: x509.Certificate) -> x509.UnrecognizedExtension | None:
    """What a certificate says of keys before its own."""
    try:
        found = certificate.extensions.get_extension_for_oid(x509.ObjectIdentifier(OID)).value
    except x509.ExtensionNotFound:
        return None
    return found if isinstance(found, x509.UnrecognizedExtension) else None


def _issue(
    key: ec.EllipticCurvePrivateKey,
    hosts: tuple[str, ...],
    now: datetime.datetime,
    extension: x509.UnrecognizedExtension | None,
) -> x509.Certificate:
    """A certificate for `hosts`, signed by its own key."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "scope-registry")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName(_names(hosts)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    if extension is not None:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key, hashes.SHA256())


def _names(hosts: tuple[str, ...]) -> list[x509.GeneralName]:
    """Subject alternative names: addresses as addresses."""
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return names
