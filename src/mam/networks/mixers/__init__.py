"""Sequence layers along the agents."""
