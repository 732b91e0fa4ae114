"""What can be measured of a GPU's engine, with one or without."""
