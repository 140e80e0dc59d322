"""A policy outside of this library: exported programs, their card, and what they are checked by."""
