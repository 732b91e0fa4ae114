"""The faces: thin translations between a wire format and the service."""
