"""Joint trajectories on disk."""
