"""Memory over environment steps."""
