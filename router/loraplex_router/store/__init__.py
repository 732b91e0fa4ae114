"""What several routers share: a Redis server that keeps it for them."""
