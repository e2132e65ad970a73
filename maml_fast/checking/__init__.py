"""Every backend against the float64 reference."""
