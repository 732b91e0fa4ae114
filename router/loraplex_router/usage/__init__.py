"""What requests have used: an event for each, and totals by tenant, adapter and day, which routers may share."""
