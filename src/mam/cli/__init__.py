"""The command `mam`."""
