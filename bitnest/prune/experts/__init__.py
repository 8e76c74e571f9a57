"""Which experts go, what takes their place, and what the router then needs."""
