"""The operations behind all faces: a request is checked, made into sequences (`prompts.py`), placed and submitted
(`service.py`)."""
