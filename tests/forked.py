"""Processes of tests, forked from one that has imported what each of them would take seconds to import."""

import torch.multiprocessing

context = torch.multiprocessing.get_context("forkserver")
# These are found from the folder that pytest runs in.
context.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.optim",
        "bench.study.command",
        "sklearn.datasets",
        "sklearn.model_selection",
    ]
)
