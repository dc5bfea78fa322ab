"""Model: what a model file is, and which there are."""
