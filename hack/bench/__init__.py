"""Benchmarks: how soon, how much, how many lost, on this very machine, in the lab's namespaces.

`python -m bench [NAME ...]` runs all of them or those named, writes `build/bench/NAME.json` for each as soon
as it is done, and prints a table. docs/benchmarks.md says what each measures, how, and its target.

    result      a benchmark, its target, its samples: pure
    machine     what the figures were measured on
    packets     pings and numbered datagrams, sent and counted by this process
    agents      agents on the lab's hosts: start, kill, ask
    standins    many peers in one process, for what depends on their number
    the others  one subject each
"""
