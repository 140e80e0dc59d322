"""Policies and what they are made of."""
