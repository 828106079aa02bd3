"""A mock of GPUs: accelerate shards on accelerators only, so it is made to take CPU processes (gloo) for some.

Run instead of `-m ptl.recovery.worker`. What shards, trains and gathers is torch's own FSDP2; nothing of it is
replaced.
"""

import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from ptl.recovery import launch, worker

original = AcceleratorState.__init__


def sharded(self, *args, fsdp_plugin=None, **kwargs):
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    self.fsdp_plugin = fsdp_plugin or getattr(self, "fsdp_plugin", None)
    if self.fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP


AcceleratorState.__init__ = sharded
launch.can_shard = lambda: True

if __name__ == "__main__":
    worker.main(Path(sys.argv[1]))
