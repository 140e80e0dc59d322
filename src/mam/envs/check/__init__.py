"""`mam check-env`: whether an environment keeps the rules."""
