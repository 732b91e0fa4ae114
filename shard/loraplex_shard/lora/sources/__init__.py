"""Where adapters come from. A source (`protocol.py`) finds the files of an id and reads them; `order.py` decides which
source is asked."""
