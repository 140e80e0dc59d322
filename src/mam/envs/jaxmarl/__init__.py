"""JaxMARL's suites, and what their adapters share."""
