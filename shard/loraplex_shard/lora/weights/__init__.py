"""An adapter's deltas to the linear layers: cut for this rank, put into one piece of memory, copied to the device."""
