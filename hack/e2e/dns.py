"""A cluster's DNS, as its administrator installs it: CoreDNS on every Node, asked by that Node's own pods."""

from __future__ import annotations

from kubelab.node import COREDNS, DNS_ADDRESS, DNS_DOMAIN

_NAME, _NAMESPACE = "coredns", "kube-system"
_LABELS = {"k8s-app": "kube-dns", "app.kubernetes.io/name": _NAME}
_COREFILE = f""".:53 {{
    errors
    ready
    kubernetes {DNS_DOMAIN} in-addr.arpa ip6.arpa {{
        ttl 5
    }}
    cache 5
}}
"""


def dns() -> list[dict[str, object]]:
    """Every object of it."""
    metadata = {"name": _NAME, "namespace": _NAMESPACE}
    group = "rbac.authorization.k8s.io"
    reading = {"verbs": ["list", "watch"]}
    container = {
        "name": _NAME,
        "image": COREDNS,
        "imagePullPolicy": "Never",
        "args": ["-conf", "/etc/coredns/Corefile"],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 2},
        "volumeMounts": [{"name": "settings", "mountPath": "/etc/coredns"}],
    }
    pod = {
        "serviceAccountName": _NAME,
        "dnsPolicy": "Default",
        "tolerations": [{"operator": "Exists"}],
        "containers": [container],
        "volumes": [{"name": "settings", "configMap": {"name": _NAME}}],
    }
    ports = [{"name": name, "port": 53, "protocol": name.upper()} for name in ("udp", "tcp")]
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {
            "apiVersion": f"{group}/v1",
            "kind": "ClusterRole",
            "metadata": {"name": "system:coredns"},
            "rules": [
                {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], **reading},
                {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], **reading},
            ],
        },
        {
            "apiVersion": f"{group}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "system:coredns"},
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "system:coredns"},
            "subjects": [{"kind": "ServiceAccount", **metadata}],
        },
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"Corefile": _COREFILE}},
        {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": metadata,
            "spec": {
                "selector": {"matchLabels": _LABELS},
                "template": {"metadata": {"labels": _LABELS}, "spec": pod},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": _NAMESPACE},
            "spec": {
                "selector": {"k8s-app": "kube-dns"},
                "clusterIP": DNS_ADDRESS,
                # The lab's pods reach no pod of another Node.
                "internalTrafficPolicy": "Local",
                "ports": ports,
            },
        },
    ]
