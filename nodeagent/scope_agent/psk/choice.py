"""What a machine is set to make post-quantum keys by: its own, which no mesh and no peer changes."""

from __future__ import annotations

from dataclasses import dataclass

from scope.model import ConfigError

SUITE_NUMBERS = (1, 2)  # those of `provider.SUITES`, which a start does not import
CRYPTOGRAPHY, LIBOQS = "cryptography", "liboqs"


@dataclass(frozen=True, slots=True)
class KeyChoice:
    """`library`: the file of liboqs; "" where the machine's own loader is to find it."""

    suite: int = 1
    provider: str = CRYPTOGRAPHY
    library: str = ""


DEFAULT = KeyChoice()


def parse_choice(*, suite: str, provider: str) -> KeyChoice:
    """A choice of two options, `cryptography`, `liboqs` or `liboqs:FILE` the second. Raises ConfigError."""
    if suite not in map(str, SUITE_NUMBERS):
        known = " and ".join(map(str, SUITE_NUMBERS))
        raise ConfigError(f"no suite {suite!r} of post-quantum keys: --key-suite is one of {known}")
    name, colon, library = provider.partition(":")
    if name not in (CRYPTOGRAPHY, LIBOQS) or (colon and (name != LIBOQS or not library.startswith("/"))):
        raise ConfigError(
            f"{provider!r} makes no post-quantum keys: --key-provider is cryptography, liboqs, or "
            "liboqs:FILE with the whole path of its shared library"
        )
    return KeyChoice(int(suite), name, library)
