"""One step: what is remembered of each sequence (`rows.py`), what a plan does to it (`runner.py`), and what is answered
(`results.py`, `failures.py`, `pooling.py`)."""
