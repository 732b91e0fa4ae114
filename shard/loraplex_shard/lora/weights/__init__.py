"""What an adapter adds to the linear layers, cut for this rank and laid out for its device."""
