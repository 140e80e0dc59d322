"""The algorithm: acting in environments, advantages, losses, updates."""
