"""Runs a program on one rank of torchrun and ends the process without the interpreter's own farewell.

A process group that a DDP model still holds is torn down when the interpreter ends, and then sometimes aborts
the process ("terminate called without an active exception": 3 of 40 runs on a busy machine, after all the
work was done). What the tests are about is over by then.
"""

import os
import runpy
import sys

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
