"""A training script whose second process kills itself when it enters a method of the Trainer at a step.

torchrun --nproc-per-node 2 tests/killed_worker.py METHOD STEP MODULE ARGUMENTS
"""

import os
import runpy
import signal
import sys

from transformers import Trainer

if __name__ == "__main__":
    name, step, module, *arguments = sys.argv[1:]
    original = getattr(Trainer, name)

    def killed(self, *args, **kwargs):
        if self.args.process_index == 1 and self.state.global_step == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    setattr(Trainer, name, killed)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
