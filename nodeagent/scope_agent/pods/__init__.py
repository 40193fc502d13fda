"""Pods of other clusters: what leads to them on this machine, and what keeps their packets as they are."""
