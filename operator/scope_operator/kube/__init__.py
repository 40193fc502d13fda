"""The operator on Kubernetes: the shell around `reconcile`, its election, its Events, metrics and health.

cluster   what is read of the cluster itself: its identity, its Nodes
watching  kopf feeds every change of meshes, peers and Nodes to the reconciler
lease     which replica writes
news      what is worth an Event
report    metrics, /healthz, /readyz
process   all of it in one process
"""
