"""What a user runs once on a machine: the updates against their oracle, waits, rates, memory, equal ranks."""
