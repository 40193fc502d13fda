"""Being carried over TCP where a network lets no UDP out, and carrying others as a hub."""
