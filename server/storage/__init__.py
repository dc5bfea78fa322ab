"""Storage: what outlives the process."""
