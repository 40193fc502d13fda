"""`make e2e`: Scope on clusters that really run, installed as users install it.

Real API servers, controller managers, schedulers, kubelets, containerd, kube-proxy and CoreDNS, Nodes behind
NATs of the lab, the images that `make image` builds, and the chart as `helm package` makes it. Every step is
one that a user takes or sees. docs/e2e.md says what is tried.

    cluster    one cluster by its kubeconfig: kubectl, helm
    landscape  the lab's clusters, and where their machines are
    existing   clusters that are there, or that kind makes
    dns        what answers for names in the lab's clusters
    story      what is done and checked, in order
    machines   what takes the machines: pings between Nodes, what they hold before and after
    faults     what happens to clusters meanwhile
    traffic    pods that answer, call and stream; pod is what runs in them
    nodes      what a Node holds
    bundle     what is kept of a run that failed
"""
