"""The demo: a mesh comes up through ten NATs, then its machines roam, reboot their NAT, leave and join.

`python -m demo` (by way of `make demo`) shows it on a terminal, tells it in lines elsewhere, and leaves
`build/demo.json`. It ends with 0 only if every pair that can be direct is direct, and a real ping through
WireGuard came back both ways.

    cast        the sites and machines: data
    origin      where members come from: a registry that they join
    kubernetes  the same with a cluster, whose Nodes they are
    story       what happens to them, in order, and how long each thing may take
    frame       what is to be seen at one moment, as values
    screen      showing frames and telling events, on a terminal or in lines
    summary     what it came to: the table of pairs, and the file
"""
