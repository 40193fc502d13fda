"""A cluster as a gateway meets it: the key of its operator, and an API server that signs tokens.

Elliptic keys are derived from a seed; the one RSA key is drawn once, since nothing depends on its value.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from scope_operator.tokens import make_token

from scope.cluster_enrolment import ClusterEnrolment, cluster_enrolment_to_dict, sign_cluster_enrolment
from scope.credentials import AUDIENCE, ClusterCredential
from scope.model import (
    AgentTokens,
    Cluster,
    ClusterTrust,
    Curve,
    EcKey,
    Meta,
    Peer,
    PeerSpec,
    PublicKey,
    Role,
    RsaKey,
    Secret,
    ServiceAccount,
    TokenKey,
)
from scope.registry.memory import MemoryRegistry

ISSUER = "https://kubernetes.default.svc.cluster.local"  # of every cluster that was not told otherwise
ACCOUNT = ServiceAccount("scope-system", "scope-agent")
SECRET = Secret(bytes(range(32)))
CURVES = {Curve.P256: ec.SECP256R1(), Curve.P384: ec.SECP384R1(), Curve.P521: ec.SECP521R1()}


@cache
def rsa_key(number: int) -> rsa.RSAPrivateKey:
    """One RSA key for each number."""
    return rsa.generate_private_key(65537, 2048)


@dataclass(frozen=True)
class ApiServer:
    """What signs the tokens of a cluster: with RSA, or on a curve."""

    number: int
    kid: str = "key-1"
    curve: Curve | None = Curve.P256

    @property
    def private(self) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey:
        if self.curve is None:
            return rsa_key(self.number)
        return ec.derive_private_key(self.number + 1, CURVES[self.curve])

    @property
    def algorithm(self) -> str:
        if self.curve is None:
            return "RS256"
        return {Curve.P256: "ES256", Curve.P384: "ES384", Curve.P521: "ES512"}[self.curve]

    @property
    def public(self) -> TokenKey:
        match self.private:
            case rsa.RSAPrivateKey() as private:
                numbers = private.public_key().public_numbers()
                return RsaKey(self.kid, numbers.n, numbers.e)
            case private:
                assert self.curve is not None
                point = private.public_key().public_numbers()
                return EcKey(self.kid, self.curve, point.x, point.y)

    @property
    def pem(self) -> bytes:
        return self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def token(self, *, node: str = "n1", wall: float | None = None, **changes: object) -> str:
        """A token as a kubelet projects it into an agent's pod; a change to None takes a claim away."""
        claims = {
            name: value for name, value in (self.claims(node, wall) | changes).items() if value is not None
        }
        return jwt.encode(claims, self.private, algorithm=self.algorithm, headers={"kid": self.kid})

    def claims(self, node: str = "n1", wall: float | None = None) -> dict[str, Any]:
        now = int(time.time() if wall is None else wall)
        return {
            "iss": ISSUER,
            "aud": [AUDIENCE],
            "sub": f"system:serviceaccount:{ACCOUNT.namespace}:{ACCOUNT.name}",
            "iat": now,
            "nbf": now,
            "exp": now + 3600,
            "kubernetes.io": {
                "namespace": ACCOUNT.namespace,
                "node": {"name": node, "uid": f"uid-of-{node}"},
                "pod": {"name": "scope-agent-x7k2p", "uid": "uid-of-a-pod"},
                "serviceaccount": {"name": ACCOUNT.name, "uid": "uid-of-an-account"},
            },
        }


@dataclass(frozen=True)
class JoiningCluster:
    """A cluster that asks to join, with the key of its operator."""

    name: str = "west"
    uid: str = "kube-system-of-west"
    seed: int = 77
    mesh: str = "home"
    api: ApiServer = field(default_factory=lambda: ApiServer(1))

    @property
    def signing(self) -> Secret:
        return Secret(self.seed.to_bytes(32, "big"))

    @property
    def tokens(self) -> AgentTokens:
        return AgentTokens(ISSUER, (self.api.public,), ACCOUNT)

    @property
    def cluster(self) -> Cluster:
        return Cluster(self.name, self.uid, ClusterTrust(public_half(self.signing), self.tokens))

    def request(self, *, registry: Secret, token: str = "tk-1", secret: Secret = SECRET) -> ClusterEnrolment:
        asked = ClusterEnrolment(self.mesh, token, secret, self.cluster)
        return sign_cluster_enrolment(asked, registry=public_half(registry), signing=self.signing)

    def document(self, *, registry: Secret, token: str = "tk-1") -> dict[str, object]:
        return cluster_enrolment_to_dict(self.request(registry=registry, token=token))

    def credential(self, registry_id: str) -> ClusterCredential:
        return ClusterCredential(self.mesh, self.name, self.uid, registry_id, self.signing)

    def peer(self, node: str = "n1", *, node_uid: str = "") -> Peer:
        """The peer of one of its Nodes, as its operator creates it."""
        spec = PeerSpec(self.mesh, cluster=self.name, node_name=node, node_uid=node_uid or f"uid-of-{node}")
        return Peer(Meta(f"{self.mesh}.{self.name}.{node}"), spec)


def public_half(signing: Secret) -> PublicKey:
    """The public key of an Ed25519 seed."""
    return PublicKey(Ed25519PrivateKey.from_private_bytes(signing.raw).public_key().public_bytes_raw())


async def invite(
    registry: MemoryRegistry,
    token_id: str = "tk-1",
    *,
    wall: float,
    single_use: bool = True,
    role: Role = Role.AUTO,
    mesh: str = "home",
) -> None:
    """Create a join token whose secret is SECRET, for an hour."""
    token = make_token(
        token_id=token_id,
        secret=SECRET,
        mesh=mesh,
        role=role,
        wall=wall,
        lifetime=3600.0,
        single_use=single_use,
    )
    await registry.create(replace(token, meta=Meta(token_id)))
