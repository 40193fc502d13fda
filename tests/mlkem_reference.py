"""ML-KEM by the letter of FIPS 203, slowly: a second implementation to hold providers against.

Deterministic, unlike what libraries offer: the encapsulation takes its randomness. `LIBRARY` has the shape of
liboqs, so that the provider for it can be tried where the library is not.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scope_agent.psk.liboqs_provider import Library

Q, N = 3329, 256
Poly = list[int]


@dataclass(frozen=True, slots=True)
class Parameters:
    k: int
    du: int
    dv: int  # eta is 2 throughout, for both sizes used here

    @property
    def public_bytes(self) -> int:
        return 384 * self.k + 32

    @property
    def ciphertext_bytes(self) -> int:
        return 32 * (self.du * self.k + self.dv)


PARAMETERS = {"ML-KEM-768": Parameters(3, 10, 4), "ML-KEM-1024": Parameters(4, 11, 5)}


def make_keys(p: Parameters, seed: bytes) -> tuple[bytes, bytes]:
    """Algorithm 16: encapsulation and decapsulation key of d | z."""
    d, z = seed[:32], seed[32:]
    rho, sigma = _halves(_g(d + bytes((p.k,))))
    s = [_ntt(_noise(sigma, n)) for n in range(p.k)]
    e = [_ntt(_noise(sigma, p.k + n)) for n in range(p.k)]
    t = [_add(_sum(_multiply(_uniform(rho, j, i), s[j]) for j in range(p.k)), e[i]) for i in range(p.k)]
    public = b"".join(_encode(each, 12) for each in t) + rho
    private = b"".join(_encode(each, 12) for each in s) + public + hashlib.sha3_256(public).digest() + z
    return public, private


def encapsulate(p: Parameters, public: bytes, m: bytes) -> tuple[bytes, bytes]:
    """Algorithm 17: secret and ciphertext of the randomness m."""
    secret, r = _halves(_g(m + hashlib.sha3_256(public).digest()))
    return secret, _encrypt(p, public, m, r)


def decapsulate(p: Parameters, private: bytes, ciphertext: bytes) -> bytes:
    """Algorithm 18, implicit rejection included."""
    size = 384 * p.k
    public, hashed, z = private[size : 2 * size + 32], private[-64:-32], private[-32:]
    cut = 32 * p.du * p.k
    u = [_decompress(_decode(ciphertext[at : at + 32 * p.du], p.du), p.du) for at in range(0, cut, 32 * p.du)]
    v = _decompress(_decode(ciphertext[cut:], p.dv), p.dv)
    s = [_decode(private[at : at + 384], 12) for at in range(0, size, 384)]
    inner = _inverse(_sum(_multiply(a, _ntt(b)) for a, b in zip(s, u, strict=True)))
    m = _encode(_compress([(a - b) % Q for a, b in zip(v, inner, strict=True)], 1), 1)
    secret, r = _halves(_g(m + hashed))
    if _encrypt(p, public, m, r) != ciphertext:
        return hashlib.shake_256(z + ciphertext).digest(32)
    return secret


def _encrypt(p: Parameters, public: bytes, m: bytes, r: bytes) -> bytes:
    rho = public[-32:]
    t = [_decode(public[at : at + 384], 12) for at in range(0, 384 * p.k, 384)]
    y = [_ntt(_noise(r, n)) for n in range(p.k)]
    u = [
        _add(_inverse(_sum(_multiply(_uniform(rho, i, j), y[j]) for j in range(p.k))), _noise(r, p.k + i))
        for i in range(p.k)
    ]
    inner = _inverse(_sum(_multiply(a, b) for a, b in zip(t, y, strict=True)))
    v = _add(_add(inner, _noise(r, 2 * p.k)), _decompress(_decode(m, 1), 1))
    return b"".join(_encode(_compress(each, p.du), p.du) for each in u) + _encode(_compress(v, p.dv), p.dv)


def _g(data: bytes) -> bytes:
    return hashlib.sha3_512(data).digest()


def _halves(data: bytes) -> tuple[bytes, bytes]:
    return data[:32], data[32:]


def _uniform(rho: bytes, column: int, row: int) -> Poly:
    """Algorithm 7; 840 bytes are enough but once in 2^38 times."""
    data = hashlib.shake_128(rho + bytes((column, row))).digest(840)
    found = []
    for a, b, c in zip(data[::3], data[1::3], data[2::3], strict=True):
        found += [value for value in (a | (b & 15) << 8, b >> 4 | c << 4) if value < Q]
    return found[:N]


def _noise(seed: bytes, number: int) -> Poly:
    """Algorithm 8 with eta = 2."""
    bits = int.from_bytes(hashlib.shake_256(seed + bytes((number,))).digest(128), "little")
    nibbles = [bits >> at & 15 for at in range(0, 4 * N, 4)]
    return [((x & 1) + (x >> 1 & 1) - (x >> 2 & 1) - (x >> 3)) % Q for x in nibbles]


_ZETAS = [pow(17, int(f"{i:07b}"[::-1], 2), Q) for i in range(128)]
_GAMMAS = [pow(17, 2 * int(f"{i:07b}"[::-1], 2) + 1, Q) for i in range(128)]


def _ntt(poly: Poly) -> Poly:
    f, i, length = list(poly), 1, 128
    while length >= 2:
        for start in range(0, N, 2 * length):
            zeta, i = _ZETAS[i], i + 1
            for j in range(start, start + length):
                t = zeta * f[j + length]
                f[j + length], f[j] = (f[j] - t) % Q, (f[j] + t) % Q
        length //= 2
    return f


def _inverse(poly: Poly) -> Poly:
    f, i, length = list(poly), 127, 2
    while length <= 128:
        for start in range(0, N, 2 * length):
            zeta, i = _ZETAS[i], i - 1
            for j in range(start, start + length):
                t = f[j]
                f[j], f[j + length] = (t + f[j + length]) % Q, zeta * (f[j + length] - t) % Q
        length *= 2
    return [x * 3303 % Q for x in f]


def _multiply(f: Poly, g: Poly) -> Poly:
    out = []
    for i, gamma in enumerate(_GAMMAS):
        a, b, c, d = f[2 * i], f[2 * i + 1], g[2 * i], g[2 * i + 1]
        out += [(a * c + b * d * gamma) % Q, (a * d + b * c) % Q]
    return out


def _add(f: Poly, g: Poly) -> Poly:
    return [(a + b) % Q for a, b in zip(f, g, strict=True)]


def _sum(polys: Iterable[Poly]) -> Poly:
    return [sum(column) % Q for column in zip(*polys, strict=True)]


def _compress(poly: Poly, bits: int) -> Poly:
    return [((x << bits) + Q // 2) // Q % (1 << bits) for x in poly]


def _decompress(poly: Poly, bits: int) -> Poly:
    return [(x * Q + (1 << bits - 1)) >> bits for x in poly]


def _encode(poly: Sequence[int], bits: int) -> bytes:
    return sum(x << at * bits for at, x in enumerate(poly)).to_bytes(32 * bits, "little")


def _decode(data: bytes, bits: int) -> Poly:
    number, mask = int.from_bytes(data, "little"), (1 << bits) - 1
    return [number >> at * bits & mask for at in range(N)]


# --- in the shape of liboqs ---------------------------------------------------------------------------------

_Buffer = ctypes.Array[ctypes.c_char]


def _new(name: bytes) -> Parameters | None:
    return PARAMETERS.get(name.decode())


def _make_keys(p: Parameters, public: _Buffer, private: _Buffer, seed: bytes) -> int:
    public.raw, private.raw = make_keys(p, seed)
    return 0


def _encapsulate(p: Parameters, ciphertext: _Buffer, secret: _Buffer, public: bytes) -> int:
    secret.raw, ciphertext.raw = encapsulate(p, public, hashlib.sha256(public).digest())
    return 0


def _decapsulate(p: Parameters, secret: _Buffer, ciphertext: bytes, private: _Buffer) -> int:
    secret.raw = decapsulate(p, private.raw, ciphertext)
    return 0


LIBRARY = Library(_new, _make_keys, _encapsulate, _decapsulate)
