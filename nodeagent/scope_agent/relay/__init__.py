"""Relaying for others, and being relayed: what a hub grants, and what a peer asks hubs for."""
