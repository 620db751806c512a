"""Runs a module as `python -m` does, with Accelerate's FSDP on the CPU too, where Accelerate leaves it out.

    accelerate launch --config_file fsdp.yaml tests/fsdp_on_cpu.py MODULE ARGUMENTS

Asked for FSDP, Accelerate shards models over several GPUs and the like, but with several CPU processes it silently runs
DDP. Here its state says FSDP with the plugin that it made from the configuration; the rest is Accelerate's own.
"""

import runpy
import sys
import time

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

original = AcceleratorState.__init__


def with_fsdp(self, *args, fsdp_plugin=None, **kwargs) -> None:
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)  # takes the type and device from the processes, each time
    plugin = fsdp_plugin or vars(self).get("fsdp_plugin")
    if plugin is not None:
        self.fsdp_plugin, self.distributed_type, self.device = plugin, DistributedType.FSDP, torch.device("cpu")


if __name__ == "__main__":
    AcceleratorState.__init__ = with_fsdp
    sys.argv = sys.argv[1:]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    finally:
        # Sharded parameters keep gloo's threads alive, which abort an interpreter that ends while they let go of the
        # last sum's tensors.
        time.sleep(0.5)
