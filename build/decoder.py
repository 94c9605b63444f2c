"""Language model of a LLaVA checkpoint → the folder that the CPU decoder serves."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration


def write_decoder(captioner_dir: Path, out_dir: Path) -> LlamaConfig:
    """Write `config.json` and one `model.safetensors` of a LlamaForCausalLM; returns its configuration."""
    captioner = LlavaForConditionalGeneration.from_pretrained(captioner_dir, dtype="auto")
    config = captioner.config.text_config
    assert isinstance(config, LlamaConfig)
    decoder = LlamaForCausalLM(config)
    decoder.to(dtype=captioner.dtype)
    decoder.model.load_state_dict(captioner.model.language_model.state_dict())
    decoder.lm_head.load_state_dict(captioner.lm_head.state_dict())
    # One file: the decoder maps it into memory, so shards would buy nothing.
    decoder.save_pretrained(out_dir, max_shard_size="1TB")
    # Older readers (the transformers 4 beside TensorRT-LLM) know these two under their former names only, and would
    # fall back to defaults in silence.
    path = out_dir / "config.json"
    document = json.loads(path.read_text())
    document["torch_dtype"] = str(captioner.dtype).removeprefix("torch.")
    document["rope_theta"] = (document.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    path.write_text(json.dumps(document, indent=2) + "\n")
    return config
