"""Runs a script as one of several processes on a machine without a GPU:
`one_of_two.py SCRIPT ARGUMENTS`.
"""

import runpy
import sys

from accelerate.state import DistributedType, PartialState
from launches import end_process

if "--deepspeed" in sys.argv:
    # accelerate sets up no process group for DeepSpeed there.
    on_gloo = ("gloo", DistributedType.MULTI_CPU)
    PartialState._prepare_backend = lambda self, *args, **kwargs: on_gloo
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
end_process()
