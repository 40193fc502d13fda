"""What all sides of Scope share: the model, the wire format, the channel, topology, the Registry port."""
