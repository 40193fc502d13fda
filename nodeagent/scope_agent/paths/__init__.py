"""The paths room: candidates, hole punching, path choice. Pure; time and randomness are arguments."""
