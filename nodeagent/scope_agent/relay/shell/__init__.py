"""The relay room's shells: what forwards on a hub, in its kernel and beside it."""
