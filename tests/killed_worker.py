"""The training script, in which the second process kills itself when it enters a method of the Trainer at a step.

torchrun --nproc-per-node 2 tests/killed_worker.py METHOD STEP ARGUMENTS
"""

import os
import signal
import sys

from pretraining.pretrain_mlm import MaskedLMTrainer, main

if __name__ == "__main__":
    name, step, *arguments = sys.argv[1:]
    original = getattr(MaskedLMTrainer, name)

    def killed(self, *args, **kwargs):
        if self.args.process_index == 1 and self.state.global_step == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    setattr(MaskedLMTrainer, name, killed)
    sys.exit(main(arguments))
