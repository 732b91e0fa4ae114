"""The operations behind all faces (`service.py`): a request is checked, placed and made into sequences
(`preparation.py`, `prompts.py`), and started, until it ends (`requests.py`)."""
