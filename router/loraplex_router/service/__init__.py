"""What the faces call: a request is checked whole, made into sequences (`prompts.py`), placed and submitted
(`service.py`)."""
