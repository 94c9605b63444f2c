"""How many examples per second does the ranker's training take, and what do the lookups' libraries cost it?

Why: more seeds and arms per hour make better experiments; the loop must be bound by arithmetic and memory, not by
    Python or by reading the examples.
Regime: one process, all cores, one model and one batch size for all; examples of the generated catalogue's sizes (its
    tables fit into the cache of a large core) come from one Parquet file, streamed, shuffled and padded anew each time.
Ceiling: an example reads its table rows once and updates them once, so 3 × rows × dimension × 4 bytes, and row-wise
    Adagrad 8 more per row, against the memory bandwidth measured in the same run. The dense part takes 6 operations
    per weight. Nothing reaches either.
Method: one round after the other, each contender once per round in turning order, the first round left out; medians
    with the lowest and highest round, ratios within a round. Shared machines are noisy: compare within a report.

    ours             trainer.ranker.optimise, whole: id dropout, validation, keeping the best epoch
    plain TorchRec   the same model on EmbeddingBagCollection and RowWiseAdagrad, forward, backward, step
    nn.EmbeddingBag  the same model on torch's own tables, padded ids, no jagged tensors, the same optimizers
    loading alone    the examples as tensors, no model
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.optim import RowWiseAdagrad

from benchmarks.ceiling import Machine
from benchmarks.environment import describe
from sightline.errors import ConfigError
from sightline.profile import DENSE
from trainer.examples import Batch, ItemTable, stream_examples
from trainer.ranker import RankerConfig, optimise, optimizer, tensors
from trainer.ranker_model import MODELS, FeatureArch, RankerShape, ScoreArch, new_ranker
from trainer.splits import TRAIN, VALID

OURS, TORCHREC, TORCH, LOADING = "ours", "plain TorchRec", "nn.EmbeddingBag", "loading alone"
CAPTION_TOKENS = 11  # of 24 places, as the generated captions fill them
ITEMS, USERS, CONTEXT = 8500, 1200, {"hour": 24, "position": 10}


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What to measure. The defaults take about a minute on two cores."""

    model: str = "dlrm"
    rows: int = 65_536
    batch: int = 1024
    rounds: int = 9
    """Counted ones."""
    token_rows: int = 2600
    length: int = 24
    """Places for an item's tokens, and for a profile's."""

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ConfigError(f"--model: got {self.model!r}, expected one of {', '.join(MODELS)}")
        for name, low in (("rows", 2), ("batch", 1), ("rounds", 1), ("token_rows", 2), ("length", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"--{name.replace('_', '-')}: got {getattr(self, name)}, expected {low} or more")


class TorchBags(nn.Module):
    """The same ranker on nn.EmbeddingBag: every feature's padded ids and weights go in as they are."""

    def __init__(self, shape: RankerShape) -> None:
        super().__init__()
        rows = shape.id_features | ({"tokens": shape.token_rows} if shape.token_features else {})
        self.tables = nn.ModuleDict({name: nn.EmbeddingBag(n, shape.dim, mode="sum") for name, n in rows.items()})
        self.features, self.score, self.shape = FeatureArch(shape), ScoreArch(shape), shape

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        tokens, tables = self.features.tokens(batch), self.tables
        columns = [batch["user_index"], batch["item_index"], *batch["context"].unbind(1)]
        pooled = {n: tables[n](ids[:, None]) for n, ids in zip(self.shape.id_features, columns, strict=True)}
        rows = {}
        if self.shape.sequential:
            rows = {name: F.embedding(ids, tables["tokens"].weight) for name, (ids, _) in tokens.items()}
        else:
            pooled |= {n: tables["tokens"](ids, per_sample_weights=w) for n, (ids, w) in tokens.items()}
        return self.score(self.features(pooled, rows, tokens, None), batch["dense"])


def examples(folder: Path, options: TrainingOptions) -> tuple[Path, ItemTable, RankerShape]:
    """A seeded examples file, its items' tokens, and the ranker's shape. The last row is for validation."""
    rng = np.random.default_rng(0)
    rows, places = options.rows, options.length
    shape = RankerShape(
        users=USERS, items=ITEMS, context=CONTEXT, token_rows=options.token_rows, dense=len(DENSE), model=options.model
    )

    def lists(values: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])

    item = np.minimum(rng.zipf(1.2, rows), ITEMS - 1)
    user = rng.integers(1, USERS, rows)
    profile = {
        f"{side}_tokens": lists(rng.integers(1, options.token_rows, (rows, places), dtype=np.int32))
        for side in ("profile", "profile_negative")
    } | {
        f"{side}_weights": lists(np.full((rows, places), 1 / places, np.float32))
        for side in ("profile", "profile_negative")
    }  # fmt: skip
    context = np.stack([rng.integers(0, n, rows) for n in CONTEXT.values()], 1)
    table = pa.table({
        "user_id": user, "item_id": item, "label": (rng.uniform(size=rows) < 0.2).astype(np.float32),
        "part": np.where(np.arange(rows) < rows - 1, TRAIN, VALID).astype(np.int8), "user_index": user,
        "item_index": item, "context": lists(context), **profile,
        "dense": lists(rng.normal(size=(rows, len(DENSE))).astype(np.float32)),
    })  # fmt: skip
    pq.write_table(table, folder / "examples.parquet", compression="zstd", row_group_size=16_384)
    tokens = rng.integers(1, options.token_rows, (ITEMS, places))
    tokens[:, CAPTION_TOKENS:] = 0
    return folder / "examples.parquet", (np.arange(ITEMS), tokens), shape


def plain_loop(model: nn.Module, tables: Sequence[Tensor], config: RankerConfig) -> Callable[[Iterator[Batch]], None]:
    """Forward, backward, step, as one writes it first: gradients of tables are whole tables."""
    chosen = {id(table) for table in tables}
    steps = [
        RowWiseAdagrad(tables, **config.table_options),
        torch.optim.Adam([p for p in model.parameters() if id(p) not in chosen], lr=config.lr),
    ]

    def run(batches: Iterator[Batch]) -> None:
        for batch in batches:
            logits = model(tensors(batch)).squeeze(1)
            loss = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(batch.label))
            for step in steps:
                step.zero_grad()
            loss.backward()
            for step in steps:
                step.step()

    return run


def measure(options: TrainingOptions, progress: Callable[[str], None] = print) -> dict[str, Any]:
    """Run all contenders; returns the JSON document."""
    config = RankerConfig(model=options.model, batch=options.batch, epochs=1)
    began, record = time.monotonic(), describe()
    machine = Machine.measure()
    with tempfile.TemporaryDirectory() as folder:
        path, table, shape = examples(Path(folder), options)

        def batches() -> Iterator[Batch]:
            return stream_examples(path, (TRAIN,), table, options.batch, shuffle=np.random.default_rng(0))

        ours, recs, bags = new_ranker(shape, 0), new_ranker(shape, 0), TorchBags(shape)
        ours_step = optimizer(ours, config)
        recs_run = plain_loop(recs, list(recs.tables().values()), config)
        bags_run = plain_loop(bags, [table.weight for table in bags.tables.values()], config)

        def load() -> None:
            for batch in batches():
                tensors(batch)

        contenders: dict[str, Callable[[], Any]] = {
            OURS: lambda: optimise(ours, ours_step, path, table, config, 0, "ours"),
            TORCHREC: lambda: recs_run(batches()),
            TORCH: lambda: bags_run(batches()),
            LOADING: load,
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        names = list(contenders)
        for number in range(options.rounds + 1):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                start = time.perf_counter()
                contenders[name]()
                rate = (options.rows - 1) / (time.perf_counter() - start)
                if number:
                    rates[name].append(rate)
            if number:
                progress(f"round {number}: " + ", ".join(f"{name} {rate[-1]:,.0f}" for name, rate in rates.items()))

    per_example = len(shape.id_features) + CAPTION_TOKENS + options.length
    table_bytes = per_example * (3 * shape.dim * 4 + 8)
    dense = sum(p.numel() for part in (ours.features, ours.score) for p in part.parameters())
    record["versions"] |= {name: version(name) for name in ("torchrec", "fbgemm-gpu-cpu")}
    record["hardware"] |= {
        "gflops": round(machine.flops / 1e9, 1), "gb_per_s": round(machine.bandwidth / 1e9, 1),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    ratios = {n: [a / b for a, b in zip(rates[OURS], rates[n], strict=True)] for n in names if n != OURS}
    return {
        "benchmark": "training",
        **record,
        "model": options.model, "batch": options.batch, "rows": options.rows, "rounds": options.rounds,
        "samples_per_s": {n: _spread(r) for n, r in rates.items()},
        "ours_over": {n: _spread(r, 3) for n, r in ratios.items()},
        "ceiling": {
            "table_rows_per_sample": per_example,
            "table_bytes_per_sample": table_bytes,
            "samples_per_s_by_memory": round(machine.bandwidth / table_bytes),
            "dense_operations_per_sample": 6 * dense,
            "samples_per_s_by_arithmetic": round(machine.flops / (6 * dense)),
        },
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def _spread(values: list[float], digits: int = 0) -> dict[str, float]:
    found = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: round(value, digits) if digits else round(value) for name, value in found.items()}


def report(document: dict[str, Any]) -> str:
    """The Markdown table."""
    ceiling, hardware = document["ceiling"], document["hardware"]
    memory = ceiling["samples_per_s_by_memory"]
    lines = [
        f"{document['model']}, batch {document['batch']}, {document['rounds']} rounds of {document['rows']:,} "
        f"examples, {hardware['cores']} cores of {hardware['cpu']}",
        "",
        "| loop | samples/s | spread | ours is × | of the memory ceiling |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, rate in document["samples_per_s"].items():
        ratio = document["ours_over"].get(name)
        times = f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio else ""
        share = f"{rate['median'] / memory:.1%}" if name != LOADING else ""
        lines.append(f"| {name} | {rate['median']:,} | {rate['low']:,}–{rate['high']:,} | {times} | {share} |")
    return "\n".join([
        *lines, "",
        f"Ceiling: {ceiling['table_bytes_per_sample']:,} bytes of table rows per example at {hardware['gb_per_s']} "
        f"GB/s: {memory:,} samples/s; {ceiling['dense_operations_per_sample']:,} operations of the dense part at "
        f"{hardware['gflops']} GFLOP/s: {ceiling['samples_per_s_by_arithmetic']:,} samples/s.",
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Print the question, the table, and as the last line the JSON document."""
    assert __doc__ is not None
    default = TrainingOptions()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=default.model, help=", ".join(MODELS))
    for name in ("rows", "batch", "rounds"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    options = TrainingOptions(**vars(parser.parse_args(argv)))
    print(__doc__.strip(), end="\n\n")
    document = measure(options)
    print(f"\n{report(document)}\n\n{json.dumps(document)}")


if __name__ == "__main__":
    main()
