"""Parts of a ScopeMesh and a ScopePeer that are about pods: clusters, translations, prefixes."""

from __future__ import annotations

from scope.model import IPNetwork, MeshCluster, PodPrefix, PodSource, Translation
from scope.resources.addresses import NO_PREFIX, read_route
from scope.resources.fields import Fields
from scope.resources.limits import MAX_TRANSLATIONS
from scope.resources.values import read_choice, read_cluster_name


def read_mesh_cluster(fields: Fields) -> MeshCluster:
    return MeshCluster(
        name=fields.required("name", read_cluster_name, ""),
        translate=fields.parts("translate", _read_translation, limit=MAX_TRANSLATIONS),
    )


def mesh_cluster_dict(cluster: MeshCluster) -> dict[str, object]:
    translate = [{"from": str(each.inside), "to": str(each.outside)} for each in cluster.translate]
    return {"name": cluster.name, **({"translate": translate} if translate else {})}


def _read_translation(fields: Fields) -> Translation:
    inside = fields.required("from", read_route, NO_PREFIX)
    outside = fields.required("to", read_route, NO_PREFIX)
    if not fields.refused("from", "to"):
        _refuse_another_size(fields, inside, outside, at="to")
    return Translation(inside, outside)


def read_pod_prefix(fields: Fields) -> PodPrefix:
    prefix = fields.required("prefix", read_route, NO_PREFIX)
    seen_as = fields.optional("seenAs", read_route, None)
    if seen_as is not None and not fields.refused("prefix"):
        _refuse_another_size(fields, prefix, seen_as, at="seenAs")
    return PodPrefix(
        prefix=prefix,
        source=fields.required("source", lambda value: read_choice(PodSource, value), PodSource.STATIC),
        seen_as=seen_as,
    )


def pod_prefix_dict(pods: PodPrefix) -> dict[str, str]:
    seen_as = {} if pods.seen_as is None else {"seenAs": str(pods.seen_as)}
    return {"prefix": str(pods.prefix), "source": str(pods.source), **seen_as}


def _refuse_another_size(fields: Fields, inside: IPNetwork, outside: IPNetwork, *, at: str) -> None:
    if (inside.version, inside.prefixlen) != (outside.version, outside.prefixlen):
        allowed = f"an IPv{inside.version} prefix of the same length, /{inside.prefixlen}"
        fields.refuse(str(outside), allowed, "each address has its like at the same place", at=at)
