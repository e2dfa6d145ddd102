"""`video-r1` as test_nodes.py starts it: FSDP also on CPUs, and a format reward that random weights earn."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from functools import partial

import torch
from distributed_work import let_accelerate_shard_on_cpu
from resume_runs import any_format

from video_r1.cli import main
from video_r1.rewards import scoring

if __name__ == "__main__":
    torch.set_num_threads(1)
    let_accelerate_shard_on_cpu()
    scoring.format_scores = any_format
    if "DDP_TIMEOUT" in os.environ:  # transformers passes the setting ddp_timeout on for GPUs only
        limit = timedelta(seconds=float(os.environ["DDP_TIMEOUT"]))
        start = partial(torch.distributed.init_process_group, timeout=limit)
        torch.distributed.init_process_group = start
    sys.exit(main(sys.argv[1:]))
