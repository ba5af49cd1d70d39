"""The process of one run of a sweep: the command line, which ends with the sweep that started it.

Its stdin is a pipe that the sweep holds open. When the sweep is gone, however that came about, the pipe is closed, and
the run is asked to stop as by SIGTERM: it writes a checkpoint and frees its folder.
"""

import os
import signal
import threading

from loralab.cli import main

_STDIN = 0


def _follow_parent() -> None:
    # By its number: the lock of Python's own stdin, held here for ever, would abort the process when Python ends.
    while os.read(_STDIN, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_follow_parent, daemon=True).start()
    main()
