"""The Registry port on Kubernetes: ScopeMesh and ScopePeer as custom resources, join tokens as Secrets,
heartbeats as Leases.

    access    where the API server is, whom to trust, and the token to show: in a pod, or by a kubeconfig
    client    requests and watches as plain JSON, and the server's refusals as errors of the port
    objects   Secrets, Leases, patches: what is written, as dictionaries; pure
    leases    the heartbeat of a Node's agent, and hearing those of all
    registry  the port

aiohttp speaks to the API server. The Python client for Kubernetes would take a second of a core and 23 MiB
more on every node, of which its models would be no use: it is imported for kubeconfigs alone, whose ways to
authenticate are many.
"""
