"""The contracts between the parts: protobuf messages and gRPC services, and the tensors they carry."""
