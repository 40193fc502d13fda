"""Makes a maker of keys ready: the libraries that the configuration names, loaded and tried.

Run in a thread, once, when a mesh asks for keys. liboqs is loaded as the shared library that it is, with
nothing that looks for it by other programs: `ctypes.util.find_library` runs some, and the Python package of
liboqs fetches and builds it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from scope.model import ConfigError
from scope_agent.psk.choice import LIBOQS, KeyChoice

if TYPE_CHECKING:
    from scope_agent.psk.identity import HybridIdentity, KeyMaker
    from scope_agent.psk.liboqs_provider import Library
    from scope_agent.psk.provider import Provider, RandomBytes

# What liboqs calls itself: where its files for building programs are installed, too, and without them. The
# numbers are of its binary interface; 7 is the first that makes ML-KEM keys of a seed, and more are to come.
NAMES = ("liboqs.so", *(f"liboqs.so.{number}" for number in range(7, 20)))
_POINTER, _BYTES, _STATUS = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int


def make_maker(
    choice: KeyChoice, *, identity: Callable[[Provider], HybridIdentity], random_bytes: RandomBytes
) -> KeyMaker:
    """What makes keys as `choice` says, tried once; `identity` reads ours. Raises ConfigError."""
    try:
        import_module("scope_agent.psk.core")  # else the agent's loop would, when it is told
        from scope_agent.psk.identity import KeyMaker
        from scope_agent.psk.provider import SUITES, self_test

        provider = _load(choice)
    except ImportError as error:
        raise ConfigError(
            f"post-quantum keys cannot be made here ({error}): install cryptography 48 or later"
        ) from None
    suite = SUITES[choice.suite]
    self_test(provider, suite)
    return KeyMaker(identity(provider), provider, random_bytes, suite)


def _load(choice: KeyChoice) -> Provider:
    if choice.provider != LIBOQS:
        from scope_agent.psk.cryptography_provider import CryptographyProvider

        return CryptographyProvider()
    from scope_agent.psk.liboqs_provider import LiboqsProvider

    return LiboqsProvider(load_liboqs(choice.library))


def load_liboqs(file: str = "", *, names: tuple[str, ...] = NAMES) -> Library:
    """Its functions with their types set. Raises ConfigError where it is not on this machine, or too old."""
    from scope_agent.psk.liboqs_provider import Library

    found = _open((file,) if file else names)
    if found is None:
        where = f"at {file}" if file else "where the machine's loader looks"
        raise ConfigError(
            f"post-quantum keys cannot be made here: there is no liboqs {where}; install its shared library, "
            "or set the agent's --key-provider to cryptography"
        )
    try:
        found.OQS_init.argtypes, found.OQS_init.restype = [], None
        found.OQS_KEM_new.argtypes, found.OQS_KEM_new.restype = [_BYTES], _POINTER
        makes, encapsulates, decapsulates = (
            found.OQS_KEM_keypair_derand, found.OQS_KEM_encaps, found.OQS_KEM_decaps,
        )  # fmt: skip
    except AttributeError:
        raise ConfigError(
            "post-quantum keys cannot be made here: this liboqs is older than 0.13, or another library; "
            "install a later one, or set the agent's --key-provider to cryptography"
        ) from None
    for function in (makes, encapsulates, decapsulates):
        function.argtypes, function.restype = [_POINTER, _BYTES, _BYTES, _BYTES], _STATUS
    found.OQS_init()
    return Library(found.OQS_KEM_new, makes, encapsulates, decapsulates)


def _open(names: tuple[str, ...]) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
