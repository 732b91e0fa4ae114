"""The process: builds a rank from its parts (`server.py`), answers gRPC (`service.py`), runs plans on a thread
(`steps.py`), and makes settings into what this machine can do (`machine.py`)."""
