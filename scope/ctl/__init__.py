"""scopectl: talks to a registry and to the local agent, shows what they say, decides nothing."""
