"""A mock of GPUs, in place of ptl.recovery.worker: accelerate shards CPU processes (gloo) too, by torch's own FSDP2."""

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
