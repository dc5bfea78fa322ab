"""RPC: the gRPC services, and what carries their calls."""
