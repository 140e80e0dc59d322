"""Environments: one protocol, wrappers around it, adapters to task suites, and tasks by name."""
