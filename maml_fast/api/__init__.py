"""What a person calls: `MAML`, and what its calls return."""
