"""How fast every backend runs a detector on this machine, in how much memory, and what it finds."""
