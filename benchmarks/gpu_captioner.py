"""How many images per second does a captioner of LLaMA-2-7B's shape describe on one GPU, and what holds it back?

Why: writing a caption is one decoder step per token, and a step reads all weights. It should be as fast as memory is;
    launched kernel by kernel from Python it is as fast as Python is. CUDA graphs are to close that gap: do they?
Regime: one process, one device, no Triton. Random weights (speed does not depend on them), bfloat16. Pixels lie on the
    device already. A prompt is `<s>`, the image's tokens (576 at 7b) and 20 of text. No id ends a caption, so that all
    have the same length; looking for the end is part of what is measured.
Ceiling: a step reads the decoder's weights (without the embedding matrix) and the keys and values of all tokens so far,
    at best at the bandwidth of a large copy on this device, which is measured first and counts bytes read and bytes
    written. Slots of a static cache that hold no token yet are read as well, but count for nothing.
Method: `graph` and `static` (the same steps without a graph) are the decoder that Triton serves, `generate` is plain
    transformers with its growing cache, on the same weights in the same memory. (On a CPU, `dynamic` takes the place of
    `graph`.) Each run goes all the way from pixels to ids, once with all new tokens and once with one; the difference
    is the decoding. The ways take turns; warm-up and capture are left out; medians, lowest–highest.
Parity: a small captioner with the same float32 weights on the CPU and on the device: do their logits and ids agree?

Needs torch, transformers, safetensors and numpy only:
    python -m benchmarks.gpu_captioner                               # 7b on CUDA
    python -m benchmarks.gpu_captioner --shape tiny --device cpu     # shows that the script works, nothing else
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from backends.tensorrtllm.decoder import Decoder, Prompt
from benchmarks.environment import commit
from sightline import __version__
from sightline.errors import ConfigError
from trainer.captioner_model import BOS, IMAGE, PAD, SPECIAL, new_captioner

VOCABULARY = {"7b": 32064, "tiny": 1024}  # 7b: as in LLaVA-1.5
WAYS = {"cuda": ("graph", "static", "generate"), "cpu": ("dynamic", "static", "generate")}
TEXT_TOKENS = 20
PARITY_PROMPTS = 16


@dataclass(frozen=True, kw_only=True)
class GpuOptions:
    """What to measure. By calculation, the defaults need a GPU of 48 GB; a batch that does not fit is left out."""

    shape: str = "7b"
    """7b: CLIP ViT-L/14-336, projector, LLaMA-2-7B. tiny: the captioner of the demo."""
    device: str = "cuda"
    batches: tuple[int, ...] = (1, 8, 16, 32)
    new_tokens: int = 48
    runs: int = 5
    out: Path = Path("artifacts/bench-gpu")
    """Each run writes a folder of its own here, named by the time."""
    seconds: float = 540.0
    """After so long no further batch size is begun; the report names those left out."""

    def __post_init__(self) -> None:
        if self.shape not in VOCABULARY:
            raise ConfigError(f"--shape: got {self.shape}, expected one of {', '.join(VOCABULARY)}")
        if self.device not in WAYS:
            raise ConfigError(f"--device: got {self.device}, expected one of {', '.join(WAYS)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"--device: got cuda, but torch {torch.__version__} sees no CUDA device; to try the "
                              "script without one, use --device cpu --shape tiny")
        if not self.batches or self.batches[0] < 1 or list(self.batches) != sorted(set(self.batches)):
            raise ConfigError(f"--batches: got {self.batches}, expected ascending numbers from 1 on, like 1 8 16 32 "
                              "(memory grows with them, and would be counted to the wrong one)")
        for name, low in (("new_tokens", 2), ("runs", 1), ("seconds", 0)):
            if getattr(self, name) < low:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag}: got {getattr(self, name)}, expected {low} or more")


class Captioner:
    """A LLaVA model with random weights on a device, and the decoder that Triton serves on the same weights."""

    def __init__(self, shape: str, device: str, dtype: torch.dtype, weights: dict[str, Tensor] | None = None) -> None:
        words = {str(i): i for i in range(VOCABULARY[shape])}  # only their number matters
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):  # made where they stay: 7b would be 28 GB of float32 on the host
                self.model = new_captioner(shape, Tokenizer(WordLevel(words, unk_token="0"))).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        if weights is not None:
            self.model.load_state_dict(weights)
        self.model.generation_config.eos_token_id = None
        self.device, self.dtype = device, dtype
        self.pixels = (3, *[self.model.config.vision_config.image_size] * 2)
        self.image_tokens: int = self.model.config.image_seq_length
        with tempfile.TemporaryDirectory() as folder:
            self.model.config.text_config.save_pretrained(folder)
            tensors = {f"model.{name}": value for name, value in self.model.model.language_model.state_dict().items()}
            tensors["lm_head.weight"] = self.model.lm_head.weight.data
            self.decoder = Decoder(Path(folder), device=device, weights=tensors)
        self._share()

    def _share(self) -> None:
        """Let the model's matrices be parts of those that the decoder has joined: 14 GB instead of 23 at 7b."""
        decoder = self.decoder
        heads = [count * decoder.head_dim for count in (decoder.heads, decoder.kv_heads, decoder.kv_heads)]
        for module, layer in zip(self.model.model.language_model.layers, decoder.layers, strict=True):
            attention, mlp = module.self_attn, module.mlp
            parts = (*layer["qkv"].split(heads), *layer["gate_up"].chunk(2))
            wholes = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
            for linear, part in zip(wholes, parts, strict=True):
                linear.weight.data = part

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.model.parameters())

    @property
    def step_weight_bytes(self) -> int:
        """Bytes of weights that one decoding step reads: layers, last norm, head."""
        decoder = self.decoder
        layers = [weight for layer in decoder.layers for weight in layer.values()]
        return sum(weight.nbytes for weight in (*layers, decoder.norm, decoder.lm_head))

    @property
    def token_cache_bytes(self) -> int:
        """Bytes of keys and values of one token."""
        decoder = self.decoder
        return 2 * len(decoder.layers) * decoder.kv_heads * decoder.head_dim * self.dtype.itemsize

    @torch.inference_mode()
    def prompts(self, pixels: Tensor, texts: list[list[int]], max_new: list[int]) -> list[Prompt]:
        """Pixels [B, 3, H, W] and text ids → prompts whose tables are the projected image features."""
        features = self.model.get_image_features(pixel_values=pixels).pooler_output  # B × [P, hidden]
        image = self.decoder.vocab_size + np.arange(self.image_tokens)
        return [
            Prompt(ids=np.concatenate([[BOS], image, text]), table=table, max_new=new, end_id=-1)
            for table, text, new in zip(features, texts, max_new, strict=True)
        ]

    def caption(self, way: str, pixels: Tensor, text: list[int], new_tokens: int) -> list[list[int]]:
        """Pixels [B, 3, H, W] → `new_tokens` ids for each image."""
        batch = len(pixels)
        if way != "generate":
            self.decoder.steps = way
            return self.decoder.generate(self.prompts(pixels, [text] * batch, [new_tokens] * batch))
        ids = torch.tensor([[BOS, *[IMAGE] * self.image_tokens, *text]] * batch, device=self.device)
        done = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
                                   max_new_tokens=new_tokens, do_sample=False, pad_token_id=PAD)
        return done[:, ids.shape[1]:].tolist()


def bench(options: GpuOptions, *, progress: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure, write report.json and report.md; returns the JSON document."""
    started = time.monotonic()
    folder = options.out / datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    folder.mkdir(parents=True)
    bandwidth = copy_bandwidth(options.device)
    progress(f"copy  {bandwidth / 1e9:,.1f} GB/s, read + written")
    captioner = Captioner(options.shape, options.device, torch.bfloat16)
    prompt_tokens = 1 + captioner.image_tokens + TEXT_TOKENS
    ceilings = []
    for batch in options.batches:
        # Step i of new_tokens - 1 attends to prompt_tokens + i tokens.
        cache = batch * (prompt_tokens + options.new_tokens / 2) * captioner.token_cache_bytes
        step = (captioner.step_weight_bytes + cache) / bandwidth
        ceilings.append({
            "batch": batch, "step_weight_gb": captioner.step_weight_bytes / 1e9, "step_cache_gb": cache / 1e9,
            "step_ms": step * 1e3, "decode_tokens_per_s": batch / step,
        })  # fmt: skip
        progress(f"ceiling  batch {batch:<3} {step * 1e3:>8.3f} ms a step   {batch / step:>8,.0f} tokens/s")

    rows: list[dict[str, Any]] = []
    left_out: dict[int, str] = {}
    for ceiling in ceilings:
        batch = ceiling["batch"]
        if time.monotonic() - started > options.seconds:
            left_out[batch] = f"not begun within {options.seconds:g} s"
            continue
        try:
            rows += _measure(captioner, options, ceiling, bandwidth, progress)
        except torch.OutOfMemoryError as error:
            left_out[batch] = f"out of memory: {str(error).splitlines()[0]}"
    del captioner
    if options.device == "cuda":
        torch.cuda.empty_cache()
    document = {
        "benchmark": "gpu_captioner",
        "at": datetime.now().astimezone().isoformat(timespec="seconds"),
        "hardware": hardware(options.device),
        "versions": {
            "sightline": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "cuda": torch.version.cuda, "transformers": transformers.__version__,
        },
        "commit": commit(),
        "command": shlex.join(["python", "-m", "benchmarks.gpu_captioner", *sys.argv[1:]]),
        "device": options.device, "shape": options.shape, "dtype": "bfloat16", "runs": options.runs,
        "prompt_tokens": prompt_tokens, "new_tokens": options.new_tokens,
        "copy_gb_per_s": bandwidth / 1e9,
        "ceilings": ceilings, "rows": rows, "left_out": left_out,
        "parity": [parity(options.device, dtype) for dtype in (torch.float32, torch.bfloat16)],
        "seconds": time.monotonic() - started,
        "report": str(folder),
    }  # fmt: skip
    document = _rounded(document)
    (folder / "report.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(document))
    progress(markdown(document))
    return document


def _measure(
    captioner: Captioner, options: GpuOptions, ceiling: dict[str, Any], bandwidth: float,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one batch size, one per way."""
    batch, new, ways = ceiling["batch"], options.new_tokens, WAYS[options.device]
    pixels = torch.randn(batch, *captioner.pixels, device=options.device, dtype=captioner.dtype)
    text = list(range(len(SPECIAL), len(SPECIAL) + TEXT_TOKENS))

    def run(way: str, tokens: int) -> float:
        _synchronize(options.device)
        start = time.perf_counter()
        captions = captioner.caption(way, pixels, text, tokens)
        _synchronize(options.device)
        seconds = time.perf_counter() - start
        if [len(caption) for caption in captions] != [tokens] * batch:
            raise AssertionError(f"{way}: captions of other lengths than {tokens}; this is a bug")
        return seconds

    peaks: dict[str, float | None] = {}
    for way in ways:
        run(way, 1)
        run(way, new)
        peaks[way] = _peak_gb(captioner, way, lambda way=way: run(way, new)) if options.device == "cuda" else None
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(options.runs):
        for way in ways:
            times[way].append((run(way, new), run(way, 1)))

    rows = []
    for way in ways:
        rates = [batch / whole for whole, _ in times[way]]
        steps = [(whole - first) / (new - 1) for whole, first in times[way]]
        step = statistics.median(steps)
        read = (ceiling["step_weight_gb"] + ceiling["step_cache_gb"]) * 1e9 / step
        rows.append({
            "batch": batch, "way": way,
            "images_per_s": statistics.median(rates), "images_per_s_low": min(rates), "images_per_s_high": max(rates),
            "first_token_ms": statistics.median(first for _, first in times[way]) * 1e3,
            "step_ms": step * 1e3, "step_ms_low": min(steps) * 1e3, "step_ms_high": max(steps) * 1e3,
            "decode_tokens_per_s": batch / step, "decode_gb_per_s": read / 1e9, "of_copy": read / bandwidth,
            "peak_gb": peaks[way],
        })  # fmt: skip
        progress(f"batch {batch:<3} {way:<9} {rows[-1]['images_per_s']:>8.2f} images/s   {step * 1e3:>8.3f} ms a step")
    return rows


def _peak_gb(captioner: Captioner, way: str, call: Callable[[], object]) -> float:
    """Largest device memory of tensors, in GB, while `call` runs in this way.

    What the decoder keeps from call to call (cache, graphs) does not count against `generate`.
    """
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    own = captioner.weight_bytes if way == "generate" else before
    return (own + torch.cuda.max_memory_allocated() - before) / 1e9


def copy_bandwidth(device: str, runs: int = 7) -> float:
    """Bytes per second of a large copy, every byte counted twice: read and written. Median of `runs`."""
    size, copies = (2**31, 10) if device == "cuda" else (2**27, 2)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates = []
    for _ in range(runs + 1):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        _synchronize(device)
        rates.append(2 * size * copies / (time.perf_counter() - start))
    return statistics.median(rates[1:])  # the first one warms up


@torch.inference_mode()
def parity(device: str, dtype: torch.dtype, new_tokens: int = 24) -> dict[str, Any]:
    """The small captioner: in float32 on the CPU, growing cache, against `dtype` on the device, constant shapes.

    Logits are compared along the CPU's captions, token by token; ids between captions that each side writes alone, of
    mixed lengths, so that the batch shrinks on the way.
    """
    # By default the patch embedding is TF32 on a GPU, good to 3 digits. The older of torch's two switches: the newer,
    # per operator, makes torch.onnx.export fail for the rest of the process.
    torch.backends.cudnn.allow_tf32 = False
    random = torch.Generator().manual_seed(0)
    reference = Captioner("tiny", "cpu", torch.float32)
    # Wider than fresh weights, which would make all logits much the same and all captions alike.
    weights = {
        name: torch.randn(value.shape, generator=random) * 0.15 if value.dim() > 1 else value
        for name, value in reference.model.state_dict().items()
    }
    reference = Captioner("tiny", "cpu", torch.float32, weights)
    other = Captioner("tiny", device, dtype, weights)
    other.decoder.steps = "graph" if device == "cuda" else "static"

    pixels = torch.randn(PARITY_PROMPTS, *reference.pixels, generator=random)
    texts = [torch.randint(len(SPECIAL), VOCABULARY["tiny"], (3 + i,), generator=random).tolist()
             for i in range(PARITY_PROMPTS)]
    max_new = [new_tokens - i for i in range(PARITY_PROMPTS)]

    def written(captioner: Captioner) -> list[list[int]]:
        return captioner.decoder.generate(captioner.prompts(pixels.to(device=captioner.device, dtype=captioner.dtype),
                                                            texts, max_new))

    def logits(captioner: Captioner, along: Tensor | None) -> Tensor:
        """[new_tokens, B, V]; greedy, or along the ids [new_tokens, B]."""
        prompts = captioner.prompts(pixels.to(device=captioner.device, dtype=captioner.dtype), texts,
                                    [new_tokens] * PARITY_PROMPTS)
        state, first = captioner.decoder.prefill(prompts)
        steps = [first.cpu()]
        for step in range(new_tokens - 1):
            if along is not None:
                state.tokens[:PARITY_PROMPTS] = along[step].to(captioner.device)
            steps.append(captioner.decoder.step(state)[:PARITY_PROMPTS].cpu())
        return torch.stack(steps)

    expected = logits(reference, None)
    difference = (logits(other, expected.argmax(-1)) - expected).abs().max().item()
    pairs = list(zip(written(reference), written(other), strict=True))
    return {
        "dtype": str(dtype).removeprefix("torch."), "prompts": PARITY_PROMPTS,
        "largest_logit_difference": difference, "largest_logit": expected.abs().max().item(),
        "equal_captions": sum(ours == theirs for ours, theirs in pairs),
        "distinct_captions": len({tuple(ours[:min(max_new)]) for ours, _ in pairs}),
    }  # fmt: skip


def hardware(device: str) -> dict[str, Any]:
    """The device's name and settings."""
    if device == "cpu":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return {"name": (names or [platform.machine()])[0], "cores": len(os.sched_getaffinity(0))}
    properties = torch.cuda.get_device_properties(0)
    found = {"name": properties.name, "memory_gb": properties.total_memory / 1e9,
             "multiprocessors": properties.multi_processor_count}
    asked = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory")
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", f"--id=GPU-{properties.uuid}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        found |= dict(zip(asked, (value.strip() for value in answer.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):
        found["nvidia_smi"] = "no answer"
    return found


def markdown(document: dict[str, Any]) -> str:
    """The report as a page."""
    machine = ", ".join(f"{name} {value}" for name, value in document["hardware"].items())
    lines = [f"# Captioner of shape {document['shape']} on {document['hardware']['name']} ({document['device']})", ""]
    if document["device"] == "cpu" or document["shape"] != "7b":
        lines += [f"**Shape {document['shape']} on {document['device']}: this shows that the script works. No figure "
                  "here says anything about the 7b captioner on a GPU.**", ""]
    lines += [
        f"{document['dtype']}, random weights; {document['prompt_tokens']} prompt tokens, {document['new_tokens']} new "
        f"ones, no end id; medians of {document['runs']} run(s), lowest–highest. Copy: "
        f"{document['copy_gb_per_s']:,.1f} GB/s (read + written). `benchmarks/gpu_captioner.py` says what is measured.",
        "",
        "| batch | way | images/s | first token, ms | step, ms | at best, ms | tokens/s | decode GB/s | of copy "
        "| peak GB |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    best = {ceiling["batch"]: ceiling["step_ms"] for ceiling in document["ceilings"]}
    for row in document["rows"]:
        lines.append(
            f"| {row['batch']} | {row['way']} | {row['images_per_s']:.2f} ({row['images_per_s_low']:.2f}–"
            f"{row['images_per_s_high']:.2f}) | {row['first_token_ms']:.1f} | {row['step_ms']:.3f} "
            f"({row['step_ms_low']:.3f}–{row['step_ms_high']:.3f}) | {best[row['batch']]:.3f} "
            f"| {row['decode_tokens_per_s']:,.0f} | {row['decode_gb_per_s']:,.1f} | {row['of_copy']:.1%} "
            f"| {'–' if row['peak_gb'] is None else format(row['peak_gb'], '.1f')} |")
    lines += [f"| {batch} | left out: {why} |" for batch, why in document["left_out"].items()]
    lines += ["", "| small captioner against float32 on the CPU | largest logit difference | largest logit "
              "| equal captions |", "|---|--:|--:|--:|"]
    for one in document["parity"]:
        lines.append(f"| {one['dtype']} on {document['device']} | {one['largest_logit_difference']:.2g} "
                     f"| {one['largest_logit']:.3g} | {one['equal_captions']} of {one['prompts']} |")
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines += ["", f"Commit {document['commit']}, `{document['command']}`, {document['at']}; {machine}; {versions}.", ""]
    return "\n".join(lines)


def _rounded(value: Any) -> Any:
    """Floats to five significant digits, all the way down."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    """Command line; the last line that it prints is the JSON document."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {field.name: field.default for field in fields(GpuOptions)}
    parser.add_argument("--shape", default=defaults["shape"], help="7b or tiny")
    parser.add_argument("--device", default=defaults["device"], help="cuda or cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=defaults["batches"])
    parser.add_argument("--new-tokens", type=int, default=defaults["new_tokens"])
    parser.add_argument("--runs", type=int, default=defaults["runs"])
    parser.add_argument("--out", type=Path, default=defaults["out"])
    parser.add_argument("--seconds", type=float, default=defaults["seconds"], help="begin no batch size after so long")
    chosen = vars(parser.parse_args(arguments))
    try:
        options = GpuOptions(**chosen | {"batches": tuple(chosen["batches"])})
    except ConfigError as error:
        parser.error(str(error))
    print(__doc__.strip())
    print(json.dumps(bench(options), separators=(",", ":")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
