"""The join string: all that a machine needs to join a mesh, in one copy and paste.

    https://HOST:PORT/MESH#TOKENID.SECRET.PIN.REGISTRYKEY
    https://HOST:PORT/MESH/INTERFACE#TOKENID.SECRET.PIN.REGISTRYKEY

The second is of a mesh with `existingInterface`: who joins is known by the public key of that interface.
What follows `#` is a URL's fragment, which no HTTP client sends, so the secret reaches no server's log even
when somebody opens the string in a browser. SECRET, PIN and REGISTRYKEY (32 bytes each) are base64url without
padding. PIN is the SHA-256 of the SubjectPublicKeyInfo of the gateway's TLS certificate, or `-` where a
public CA vouches for it. REGISTRYKEY is the registry's Ed25519 public key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv6Address
from urllib.parse import SplitResult, urlsplit

from scope.credentials import PIN_BYTES, base64url, read_base64url
from scope.model import KEY_BYTES, ConfigError, PublicKey, Secret

SECRET_BYTES = 32
MAX_JOIN_STRING = 1024  # a host name of 253, a mesh of 63, a token id of 63 and three keys, three times over
NO_PIN = "-"
PARTS = ("token id", "secret", "certificate pin", "registry key")
FORM = "https://HOST:PORT/MESH#TOKENID.SECRET.PIN.REGISTRYKEY"
NEW_ONE = "`scopectl token create --mesh MESH` prints a fresh one"

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_INTERFACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_=+.-]{0,14}")  # as `existingInterface` has it
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


class InvalidJoinString(ConfigError):
    """A join string that is damaged; the message says what is missing and never repeats the secret."""


@dataclass(frozen=True, slots=True)
class JoinString:
    """An invitation to one mesh. `url` is the gateway's origin, `https://HOST[:PORT]`, without a path."""

    url: str
    mesh: str
    token_id: str
    secret: Secret
    pin: bytes | None  # None: the certificate is checked against the system's CAs
    registry_key: PublicKey
    interface: str = ""  # which something else manages; "": the mesh has devices of its own

    @classmethod
    def parse(cls, text: str) -> JoinString:
        """Read a join string; white space around it is cut off. Raises InvalidJoinString."""
        text = text.strip()
        if len(text) > MAX_JOIN_STRING:
            raise InvalidJoinString(f"a join string has at most {MAX_JOIN_STRING} characters; {NEW_ONE}")
        address, hash_sign, fragment = text.partition("#")
        url, mesh, interface = _parse_address(address)
        if not hash_sign or not fragment:
            raise InvalidJoinString(
                "the part after # is missing: the shell may have cut it; "
                "put the whole string in single quotes"
            )
        parts = fragment.split(".")
        if len(parts) != len(PARTS):
            lacking = PARTS[len(parts) :]
            what = f"the {' and the '.join(lacking)} after # missing" if lacking else "too much after #"
            raise InvalidJoinString(f"{what}: a join string is {FORM}; copy it whole, or {NEW_ONE}")
        token_id, secret, pin, key = parts
        if not _LABEL.fullmatch(token_id):
            raise InvalidJoinString(f"the token id after # is damaged: copy the string whole, or {NEW_ONE}")
        return cls(
            url=url,
            mesh=mesh,
            token_id=token_id,
            secret=Secret(_decode("secret", secret, SECRET_BYTES)),
            pin=None if pin == NO_PIN else _decode("certificate pin", pin, PIN_BYTES),
            registry_key=PublicKey(_decode("registry key", key, KEY_BYTES)),
            interface=interface,
        )

    def format(self) -> str:
        """The whole string, secret included: for the one who joins, and for no log."""
        pin = NO_PIN if self.pin is None else base64url(self.pin)
        parts = (self.token_id, base64url(self.secret.raw), pin, base64url(self.registry_key.raw))
        fragment = ".".join(parts)
        path = f"{self.mesh}/{self.interface}" if self.interface else self.mesh
        return f"{self.url}/{path}#{fragment}"


def _parse_address(address: str) -> tuple[str, str, str]:
    """The origin, the mesh, and the interface or "", of what stands before `#`."""
    if not address.lower().startswith("https://"):
        raise InvalidJoinString(f"a join string starts with https://: {FORM}")
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise InvalidJoinString(f"the address before # is damaged ({error}): {FORM}") from None
    if not _is_host(host, parts) or port == 0:
        raise InvalidJoinString(f"the host before # is missing or damaged: {FORM}")
    mesh, slash, interface = parts.path.removeprefix("/").removesuffix("/").partition("/")
    if not mesh:
        raise InvalidJoinString(f"the mesh is missing after the host: {FORM}")
    if not _LABEL.fullmatch(mesh) or parts.query:
        raise InvalidJoinString(f"the mesh between host and # is not a DNS label: {FORM}")
    if slash and not _INTERFACE.fullmatch(interface):
        raise InvalidJoinString(f"what follows the mesh before # is no name of an interface: {FORM}")
    name = f"[{host}]" if ":" in host else host
    return f"https://{name}" + (f":{port}" if port else ""), mesh, interface


def _is_host(host: str, parts: SplitResult) -> bool:
    if parts.username is not None or parts.password is not None:
        return False
    if ":" not in host:
        return _HOST.fullmatch(host) is not None
    try:
        IPv6Address(host)
    except ValueError:
        return False
    return True


def _decode(what: str, text: str, size: int) -> bytes:
    """Canonical base64url of exactly `size` bytes; no refusal repeats the text, it may be the secret."""
    try:
        raw = read_base64url(text)
    except ValueError:
        raw = b""
    if len(raw) != size:
        raise InvalidJoinString(f"the {what} after # is damaged: copy the string whole, or {NEW_ONE}")
    return raw
