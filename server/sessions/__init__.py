"""Sessions: what a session is and does, free of gRPC."""
