"""Where a cluster's registry is when it is elsewhere: what its operator tells its agents, and nothing secret.

The file `gateway.json`, which the ConfigMap `scope-gateway` brings to every Node:

    {"url": "https://HOST:PORT", "pin": BASE64URL or null, "mesh": "home", "registryKey": BASE64}
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from scope.credentials import PIN_BYTES, base64url, read_base64url
from scope.model import ConfigError, PublicKey

NAME = "gateway.json"


@dataclass(frozen=True, slots=True)
class GatewayFile:
    """The gateway's URL and 32-byte pin (None: a public CA vouches for it), the mesh, and who signs there."""

    url: str
    pin: bytes | None
    mesh: str
    registry_key: PublicKey

    def format(self) -> str:
        """The file's text."""
        document = {
            "url": self.url,
            "pin": None if self.pin is None else base64url(self.pin),
            "mesh": self.mesh,
            "registryKey": str(self.registry_key),
        }
        return json.dumps(document)

    @classmethod
    def parse(cls, text: str) -> GatewayFile:
        """Read the file's text. Raises ConfigError."""
        try:
            document = json.loads(text)
            return cls(
                url=str(document["url"]),
                pin=None if document["pin"] is None else _read_pin(document["pin"]),
                mesh=str(document["mesh"]),
                registry_key=PublicKey.parse(str(document["registryKey"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{NAME} is damaged ({type(error).__name__} {error}): restart the cluster's operator, which "
                "writes it anew"
            ) from None


def _read_pin(text: str) -> bytes:
    pin = read_base64url(text)
    if len(pin) != PIN_BYTES:
        raise ValueError(f"a pin is {PIN_BYTES} bytes, not {len(pin)}")
    return pin
