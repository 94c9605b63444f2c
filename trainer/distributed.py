"""The ranker on several processes: `torchrun --nproc-per-node 2 -m trainer.distributed --data … --captions …`.

TorchRec's DistributedModelParallel spreads the tables over the processes, whole (table_wise) or by ranges of rows
(row_wise); its planner chooses between the two. The rest is replicated. Every process reads row groups of its own, and
takes the rows of a batch that lie there; so the global batch, the dropped ids and with them the loss curve are those of
`trainer.ranker.fit`, up to the order of FP32 sums. The shares of a batch differ by a few rows: shorter ones are filled
up, and every process takes as many steps. Runs on CPUs, over gloo.

The folder is that of `sightline train ranker`. Its `model.pt` holds whole tables, whoever wrote it, and starts any
number of processes (`--weights`): torch.distributed.checkpoint cuts it up, and puts the parts together again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingEnv, ShardingType
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter

from trainer.captioning import read_captions
from trainer.ranker import ARMS, Prepared, RankerConfig, Shard, optimise, prepare, write_ranker
from trainer.ranker_model import MODELS, RankerShape, new_ranker

SHARDING = (ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value)


class BagSharder(EmbeddingBagCollectionSharder):
    """TorchRec offers row-wise pooled tables on GPUs alone; the reduce-scatter that they need runs on gloo, too."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(SHARDING)


def parallel(
    shape: RankerShape, config: RankerConfig, sharding: Sequence[str] = SHARDING
) -> tuple[DistributedModelParallel, torch.optim.Optimizer]:
    """A ranker over all processes of the default group, and the optimizer of its dense part.

    Tables update themselves inside of the backward pass. Its weights are no one's: load some.

    Args:
        sharding: what the planner may choose from, of `SHARDING`.
    """
    model = new_ranker(shape, seed=0)
    apply_optimizer_in_backward(RowWiseAdagrad, model.tables().values(), config.table_options)
    sharders = [BagSharder()]
    ranks = dist.get_world_size()
    may = ParameterConstraints(sharding_types=list(sharding), compute_kernels=["fused"])
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=ranks, local_world_size=ranks, compute_device="cpu"),
        constraints=dict.fromkeys(model.tables(), may),
    )
    whole = DistributedModelParallel(
        model, env=ShardingEnv.from_process_group(dist.group.WORLD), device=torch.device("cpu"),
        plan=planner.collective_plan(model, sharders, dist.group.WORLD), sharders=sharders,
    )  # fmt: skip
    dense = dict(in_backward_optimizer_filter(whole.named_parameters()))
    return whole, torch.optim.Adam(dense.values(), lr=config.lr)


def train(
    data: Path, captions: Path, out: Path, config: RankerConfig, *, sharding: Sequence[str] = SHARDING,
    start: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train the last arm of the configuration with its first seed; process 0 writes the ranker folder.

    Args:
        start: `model.pt` of the same shape to go on from, in place of fresh weights.

    Returns:
        The record: per epoch training and validation loss in nats; per process and epoch the labels that it trained
        on; seconds of training; on process 0 the version, too.
    """
    shard = Shard(rank=dist.get_rank(), ranks=dist.get_world_size())
    found, version = read_captions(captions)
    arm, first, last = config.arms[-1], out / "sharded.start", out / "sharded"
    made: Prepared | None = None
    shared: list[Any] = [None]
    if shard.rank == 0:
        made = prepare(data, found, out, config)
        shape = made.shape(config, ARMS[arm])
        fresh = new_ranker(shape, config.seed, made.tokens)
        weights = torch.load(start, weights_only=True) if start else fresh.state_dict()
        for leftover in (first, last):  # of an interrupted run
            shutil.rmtree(leftover, ignore_errors=True)
        torch.save({"model": weights}, out / "model.pt")
        torch_save_to_dcp(out / "model.pt", first)
        shared = [(shape, made.table)]
    dist.broadcast_object_list(shared)
    shape, table = shared[0]
    model, optimizer = parallel(shape, config, sharding)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=first)  # each process takes the rows that are its own
    model.load_state_dict(state["model"])
    began = time.monotonic()
    history = optimise(model, optimizer, out / "examples.parquet", table, config, config.seed, arm, shard=shard)
    seconds = time.monotonic() - began
    labels: list[Any] = [None] * shard.ranks
    dist.all_gather_object(labels, [epoch.pop("labels") for epoch in history])
    dcp.save({"model": model.state_dict()}, checkpoint_id=last)
    record = {
        "config": asdict(config), "ranks": shard.ranks, "history": history, "labels": labels,
        "seconds": round(seconds, 1),
    }  # fmt: skip
    if made is not None:
        dcp_to_torch_save(last, out / "model.pt")
        weights = torch.load(out / "model.pt", weights_only=True)["model"]
        for done in (first, last):
            shutil.rmtree(done)
        record["version"] = write_ranker(out, weights, shape, made, version, data)
        (out / "record.json").write_text(json.dumps(record, indent=2))
    dist.barrier()
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """One process of `torchrun`. Process 0 prints the record as one line of JSON."""
    parser = argparse.ArgumentParser(prog="torchrun … -m trainer.distributed", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--captions", type=Path, required=True, help="what `sightline caption` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the ranker")
    parser.add_argument("--arm", choices=ARMS, default="tokens")
    parser.add_argument("--model", choices=MODELS, default="dlrm")
    parser.add_argument("--epochs", type=int, default=RankerConfig.epochs)
    parser.add_argument("--batch", type=int, default=RankerConfig.batch, help="of all processes together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sharding", nargs="+", choices=SHARDING, default=SHARDING, help="the planner's choice")
    parser.add_argument("--weights", type=Path, help="model.pt to go on from, of any number of processes")
    given = parser.parse_args(argv)
    config = RankerConfig(
        arms=(given.arm,), model=given.model, epochs=given.epochs, batch=given.batch, seed=given.seed, seeds=1
    )
    warnings.simplefilter("ignore", FutureWarning)  # torch and TorchRec about each other
    dist.init_process_group("gloo")
    try:
        record = train(given.data, given.captions, given.out, config, sharding=given.sharding, start=given.weights)
        if dist.get_rank() == 0:
            print(json.dumps(record))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
