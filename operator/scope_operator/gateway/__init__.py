"""The HTTP face of a registry: who may do what, the event stream, the courier and the UDP reflector."""
