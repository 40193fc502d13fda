"""The carrier as the agent sees it: the file that programs it, a socket that tells, a hub's certificate.

The process is `scope-carrier`, which outlives the agent. Everything here takes milliseconds, but for `apply`,
which waits until the process does what its file says, and for a hub's first certificate.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from scope.carrier import (
    Carrier,
    CarrierReport,
    decode_report,
    encode_carrier,
)
from scope.credentials import pin_of
from scope.model import ConfigError, Secret
from scope_agent.carrier.core import CarrierSeen
from scope_agent.files import replace_file
from scope_agent.wireguard.device import ApplyError
from scope_agent.wireguard.shell.process import DataplaneProcess

IN_EFFECT_WITHIN: Final = 5.0  # seconds: a Python with an HTTP server starts, on a machine that is busy
STOP_TIMEOUT: Final = 5.0
ANSWER_TIMEOUT: Final = 2.0
_ASK_INTERVAL: Final = 0.02
_ANSWER_BYTES: Final = 16 << 20  # 10,000 members are 2 MB
# The pin is what counts: a peer knows the key, whatever the certificate around it says.
_VALID: Final = timedelta(days=3650)
_RENEW: Final = timedelta(days=365)
_BEGINS: Final = timedelta(days=2)  # a peer without UDP has no NTP either
_NAME: Final = "scope-carrier"


class CarrierMachine:
    """One mesh's carrier on this machine. `file` programs it; a hub's certificate is kept in `kept`."""

    def __init__(self, file: Path, kept: Path, *, mark: int) -> None:
        self._file, self._kept = file, kept
        self._process = DataplaneProcess("carrier", file, "--file", str(file), "--mark", str(mark))
        self._certificate: tuple[str, Secret, bytes] | None = None
        self._told: CarrierReport | None = None
        self._error = ""

    def apply(self, carrier: Carrier | None) -> CarrierSeen:
        """Have the process do this and nothing else."""
        if carrier is None:
            return self._stop()
        pin = None
        try:
            if carrier.hub is not None:
                certificate, key, pin = self._hub_certificate()
                carrier = replace(carrier, hub=replace(carrier.hub, certificate=certificate, key=key))
            text = encode_carrier(carrier)
            if not self._file.exists() or self._file.read_text(encoding="utf-8") != text:
                self._process.write(text)
            self._process.ensure_running()
            report, is_in_effect = self._await(hashlib.sha256(text.encode()).hexdigest())
        except (ApplyError, ConfigError, OSError) as error:
            return CarrierSeen(None, str(error), pin=pin, answers=True)
        self._told, self._error = report, "" if report is not None else self._why_not()
        return CarrierSeen(report, self._error, pin=pin, answers=True, is_in_effect=is_in_effect)

    def check(self) -> CarrierSeen | None:
        """Start it if it ended. What it says, where that is something else."""
        error = ""
        try:
            self._process.ensure_running()
        except ApplyError as failed:
            error = str(failed)
        report = self._ask()
        error = "" if report is not None else error or self._why_not()
        if (_told_of(report), error) == (_told_of(self._told), self._error):
            return None
        self._told, self._error = report, error
        return CarrierSeen(report, error)

    def _stop(self) -> CarrierSeen:
        self._told, self._error = None, ""
        try:
            self._process.end(STOP_TIMEOUT, terminate=True)
            self._process.forget()
        except (ApplyError, OSError) as error:
            return CarrierSeen(None, str(error), answers=True)
        return CarrierSeen(None, answers=True, is_in_effect=True)

    def _await(self, digest: str) -> tuple[CarrierReport | None, bool]:
        deadline = time.monotonic() + IN_EFFECT_WITHIN
        while True:
            report = self._ask()
            if report is not None and report.file == digest:
                return report, True
            if time.monotonic() > deadline:
                return report, False
            time.sleep(_ASK_INTERVAL)

    def _ask(self) -> CarrierReport | None:
        try:
            return decode_report(self._process.ask(ANSWER_TIMEOUT, most=_ANSWER_BYTES))
        except (OSError, ValueError, KeyError, TypeError):  # it ends, or just started
            return None

    def _why_not(self) -> str:
        return f"scope-carrier does not answer; see {self._process.log}"

    def _hub_certificate(self) -> tuple[str, Secret, bytes]:
        """PEM of certificate and key, and the pin. Raises ConfigError, OSError."""
        if self._certificate is None:
            self._certificate = hub_certificate(self._kept, now=datetime.now(UTC))
        return self._certificate


def hub_certificate(kept: Path, *, now: datetime) -> tuple[str, Secret, bytes]:
    """A hub's certificate, its key (both PEM), and the pin: from disk, made where there is none.

    Raises ConfigError where what is kept cannot be read, OSError.
    """
    try:
        text = kept.read_text(encoding="ascii")
        certificate, key = x509.load_pem_x509_certificate(text.encode()), _read_key(text)
    except FileNotFoundError:
        certificate, key = None, ec.generate_private_key(ec.SECP256R1())
    except ValueError:
        raise ConfigError(f"{kept} is damaged: remove it, and peers learn the new pin") from None
    if certificate is None or certificate.not_valid_after_utc - now < _RENEW:
        certificate = _issue(key, now)
        replace_file(kept, [_pem(certificate), _key_pem(key)], durable=True)
    return _pem(certificate), Secret(_key_pem(key).encode()), pin_of(certificate.public_bytes(Encoding.DER))


def _read_key(text: str) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(text[text.index("-----BEGIN PRIVATE KEY") :].encode(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not a key of an elliptic curve")  # noqa: TRY004 - of a file, not of a caller
    return key


def _issue(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME)])
    builder = x509.CertificateBuilder(
        issuer_name=name,
        subject_name=name,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - _BEGINS,
        not_valid_after=now + _VALID,
    )
    return builder.sign(key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode("ascii")


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode("ascii")


def _told_of(report: CarrierReport | None) -> object:
    """What is news of a report: not how much was carried."""
    if report is None:
        return None
    hubs = tuple((each.hub, each.address, each.reason) for each in report.hubs)
    members = tuple((each.peer, each.connected) for each in report.members)
    return hubs, members, report.listening, report.reason
