"""What a network computes: from a module to a `Graph` of operations."""
