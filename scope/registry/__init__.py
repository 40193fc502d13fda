"""Registries: where peers learn of each other. One port, several adapters."""
