"""Runtime: one model on one device, with the state of every session in pools that stay there."""
