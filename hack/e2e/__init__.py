"""`make e2e`: Scope on clusters that really run, installed as users install it.

Real API servers, controller managers, schedulers, kubelets, containerd and kube-proxy, Nodes behind NATs of
the lab, the image that `make image` builds, and the chart as `helm package` makes it. Every step is one that
a user takes or sees.

    cluster  one such cluster: its Nodes, kubectl, helm
    story    what is done and checked, in order
    nodes    what a Node holds, before and after
    bundle   what is kept of a run that failed
"""
