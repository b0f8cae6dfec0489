"""One of two ranks fails while the other computes; their process groups are destroyed together, like NCCL's."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from unittest import mock

import psutil
import torch.distributed

from mpo_megatron import device
from mpo_megatron.mcore.preparation import prepare

prepare()

from mpo_megatron.config import ParallelConfig  # noqa: E402
from mpo_megatron.model.parallel import model_parallel  # noqa: E402
from mpo_megatron.train.faults.ending import end  # noqa: E402


def main() -> int:
    process = Path(sys.argv[1]) / "process"
    together = mock.patch.object(torch.distributed, "destroy_process_group", side_effect=lambda: time.sleep(100))
    with together, model_parallel(ParallelConfig(), seed=1):
        mock.patch.object(device, "has_gpu", return_value=True).start()
        if torch.distributed.get_rank() == 1:
            process.with_name("partial").write_text(str(os.getpid()))
            process.with_name("partial").rename(process)
            raise RuntimeError("out of memory")
        while not process.exists():
            time.sleep(0.01)
        with contextlib.suppress(psutil.NoSuchProcess):  # the process may end at any moment
            failed = psutil.Process(int(process.read_text()))
            while failed.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.1)
        print("rank 1 has ended", flush=True)
        os._exit(0)


if __name__ == "__main__":
    end(main)
