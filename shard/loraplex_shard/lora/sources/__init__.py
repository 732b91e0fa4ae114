"""Where adapters come from: a source, as `protocol.py` has it, finds the files of an id and reads them; `order.py` says
which one is asked."""
