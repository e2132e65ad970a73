"""Meta-learning algorithms: each is one file that emits a `Program`."""
