"""The pods room's shell: routes, a rule, and the packet filter."""
