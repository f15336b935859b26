"""Stand-ins for what cannot be made to misbehave on demand."""
