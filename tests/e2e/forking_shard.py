"""`loraplex shard`, which gets SIGTERM while it forks its stager."""

import os
import signal

from loraplex.cli.main import main

if __name__ == "__main__":
    os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
    main()
