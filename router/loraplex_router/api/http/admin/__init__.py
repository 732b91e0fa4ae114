"""Administration's face: adapters are listed, loaded, unloaded and pinned."""
