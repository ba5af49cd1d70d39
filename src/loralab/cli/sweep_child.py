"""The process of one run of a sweep: the command line, which ends with the sweep that started it.

Its stdin is a pipe that the sweep holds open. When the sweep is gone, however that came about, the pipe is closed, and
the run is asked to stop as by SIGTERM: it writes a checkpoint and frees its folder.
"""

import os
import signal
import sys
import threading

from loralab.cli import main


def _follow_parent() -> None:
    while sys.stdin is not None and sys.stdin.buffer.read(1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_follow_parent, daemon=True).start()
    main()
