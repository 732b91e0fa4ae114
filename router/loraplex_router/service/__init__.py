"""The operations behind all faces: a request is checked and submitted (`service.py`) after it was placed and made into
sequences (`preparation.py`, `prompts.py`)."""
