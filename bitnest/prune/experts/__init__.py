"""Which experts go: how much each gives, what can take its place, and what the router then needs."""
