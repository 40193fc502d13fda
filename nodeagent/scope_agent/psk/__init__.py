"""Post-quantum pre-shared keys: the exchange between two agents, and the rotation without loss. Pure.

`exchange` makes a key that both sides have, `pair` carries it into the device and proves it there, `core`
keeps the pairs.
"""
