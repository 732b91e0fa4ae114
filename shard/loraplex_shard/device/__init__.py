"""What ranks and machines are made of: memory, the ranks of a group and how it is cut among them, shared memory between
them, and how they notice that one of them has ended."""
