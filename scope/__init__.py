"""What every side of Scope shares: the model, the wire format, the channel, topology and the Registry port."""
