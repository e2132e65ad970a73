"""From a plan to launches: memory, the instructions' execution, capture, tuning."""
