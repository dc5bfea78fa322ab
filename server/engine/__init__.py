"""Engine: who runs next, on one model and one device."""
