"""One replica's engine: what runs in the next step, whose blocks and slots are used, and what comes out of it."""
