"""Runs a script under accelerate's DeepSpeed on a machine without a GPU, where accelerate sets up
no process group for it: `deepspeed_on_cpu.py SCRIPT ARGUMENTS`.
"""

import runpy
import sys

from accelerate.state import DistributedType, PartialState

PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
