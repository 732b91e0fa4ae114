"""Where adapters come from: a source finds the files of an id (`local.py`, `hub.py`, `s3.py`), and `order.py` asks one
after the other."""
