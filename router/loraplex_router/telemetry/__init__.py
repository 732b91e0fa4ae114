"""What operators see: metrics, traces and one log line per request. Watches the router through the observers that
engine, wire and replicas declare: none of them depends on it."""
