"""What operators see: metrics, traces and one log line per request. Watches the router; nothing depends on it."""
