"""The carrier room's shells: the process that carries, and the certificate that a hub shows."""
