"""A plan for people (tables, shell lines) and for programs (JSON)."""

from __future__ import annotations

import shlex
from typing import Any

from rich.console import Console
from rich.table import Table

from build.execute import is_done
from build.hardware import GIB
from build.plan import Plan


def show_plan(plan: Plan) -> None:
    """Print target, memory budget, steps and notes."""
    console = Console(highlight=False, soft_wrap=True)
    c, options = plan.checkpoint, plan.options
    console.rule(f"lane {plan.lane}: {c.folder}", align="left")
    if options is not None:
        console.print(
            f"{options.gpus} x {options.gpu.name} (compute capability {'.'.join(map(str, options.gpu.capability))}), "
            f"{options.quant}, batch {options.batch}, {options.images} images of {c.image_tokens} tokens per request, "
            f"{plan.limits['new_tokens']} new tokens"
        )
    if plan.budget is not None:
        console.print(_budget_table(plan))
        b = plan.budget
        console.print(
            f"KV cache: {b.kv_per_token / 1024:.0f} KiB per token, {b.kv_per_sequence / GIB:.3f} GiB per sequence on "
            f"each GPU; kv_cache_free_gpu_mem_fraction {b.kv_fraction:.2f} holds {b.sequences} sequences of full length"
        )
    for number, step in enumerate(plan.steps, 1):
        state = "done" if is_done(step) else "to do"
        where = "in the container" if step.where == "container" else "here"
        console.print(f"\n{number}. {step.name} ({where}, {state})")
        console.print(f"   in   {', '.join(map(str, step.inputs))}", markup=False)
        console.print(f"   out  {step.output}", markup=False)
        for name, value in step.env.items():
            console.print(f"   env  {name}={value}", markup=False)
        console.print("   run  " + shlex.join(step.argv), markup=False)
    for note in plan.notes:
        console.print(f"\nNote: {note}", markup=False)


def _budget_table(plan: Plan) -> Table:
    budget = plan.budget
    assert budget is not None
    table = Table(title="Memory of the fullest GPU")
    table.add_column("use")
    table.add_column("GiB", justify="right")
    table.add_column("from")
    for line in budget.lines:
        table.add_row(line.name, f"{line.bytes / GIB:.2f}", line.how)
    table.add_section()
    table.add_row("total", f"{budget.total / GIB:.2f}", f"of {budget.memory / GIB:.2f}")
    return table


def summary(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: bytes, counts, argv arrays."""
    options, budget = plan.options, plan.budget
    return {
        "lane": plan.lane,
        "checkpoint": str(plan.checkpoint.folder),
        "target": None if options is None else {
            "gpu": options.gpu.name, "gpus": options.gpus, "quant": options.quant, "batch": options.batch,
            "images": options.images,
        },
        "limits": dict(plan.limits),
        "budget": None if budget is None else {
            "lines": {line.name: line.bytes for line in budget.lines}, "total": budget.total, "memory": budget.memory,
            "kv_per_token": budget.kv_per_token, "kv_per_sequence": budget.kv_per_sequence,
            "kv_fraction": budget.kv_fraction, "sequences": budget.sequences,
        },
        "steps": [
            {"name": step.name, "where": step.where, "argv": list(step.argv), "inputs": list(map(str, step.inputs)),
             "output": str(step.output), "env": dict(step.env), "key": step.key, "done": is_done(step)}
            for step in plan.steps
        ],
        "notes": list(plan.notes),
    }  # fmt: skip
