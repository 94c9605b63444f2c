"""Train the captioner: first the vision tower on the words of the captions, then everything on the captions.

Phase `pretrain` (off by default) lets the tower fill in masked patches of pictures, with or without captions (SimMIM,
Xie et al. 2022; not a contrastive loss, whose augmentations would teach it to ignore colours and sizes, and which wants
larger batches).
Phase `teacher` (off by default) fits a small convolutional network to the words of the captions. On few natural
pictures it sees what a transformer from scratch does not, and the tower then learns from its answers on mixtures of
pictures (distillation; Beyer et al. 2022), instead of the labels (docs/log.md).
Phase `tower` follows SuperClass (Huang et al. 2024): the tower classifies which caption words a picture
has, from max-pooled patch features. It costs a third of a captioning step and teaches the tower to see; a
decoder attached from the start waits long for that (docs/log.md). The patch embedding starts from the
whitened principal components of the training patches and positions from 2-D sinusoids.
Phase `caption` is LLaVA's language-model loss on prompt + caption.

Each phase ends with the weights that were best on held-out items, be it stopped early or not.

Every step's batch, augmentation and learning rate depend on (seed, phase, step) alone, so an interrupted run
that continues from its checkpoint ends with the same loss as one that was left alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

from sightline.errors import ConfigError, DataError
from sightline.media import MediaSpec
from sightline.prompt import LLAVA_PROMPT, CaptionPrompt
from sightline.schema import MediaReader, read_interactions, read_items, read_record
from sightline.words import WORDS
from trainer.behaviour import behaviour_words, with_behaviour
from trainer.captioner_data import IGNORE, Augmentation, Pixels, Targets, model_inputs
from trainer.captioner_model import SIZES, image_tokens, new_captioner, save_captioner, train_tokenizer
from trainer.optim import Optimizer
from trainer.splits import TRAIN, Split, micros, training_items
from trainer.tower import Convolutions, Masked, Patches, Words, start_tower

log = logging.getLogger(__name__)
MASKED = 0.6  # share of patches that pre-training hides, as SimMIM does
CHECK_ITEMS = 32  # held-out items whose frames lie beside the weights: a build measures FP16 on them
transformers_logging.disable_progress_bar()


@dataclass(frozen=True, kw_only=True)
class CaptionerConfig:
    """One run of the captioner's training."""

    size: str = "tiny"
    start: Path | None = None  # `--from`: a LLaVA checkpoint folder to go on from
    pretrain_steps: int = 0  # of the tower on masked pictures, no words
    pretrain_unseen: bool = False  # also on pictures of items that nothing else may be fitted on
    teacher_steps: int = 0  # of a convolutional teacher for the tower: for few or natural pictures
    tower_steps: int = 850
    steps: int = 560
    behaviour: int = 0  # taste words at the end of captions: clusters of items that the same users like; 0: none
    behaviour_likes: int = 5  # an item with fewer has no taste word
    behaviour_terciles: bool = False  # also words for how well liked and how widely seen an item is
    shift: int = 2  # pixels, of augmentation
    batch: int = 64  # frames-weighted: a batch of n-frame videos has batch · 2 / (n + 1) items
    lr: float = 2e-3
    muon_lr: float = 0.02
    seed: int = 0
    frames: int = 3
    valid_share: float = 0.04
    eval_every: int = 100
    patience: int = 5  # evaluations without a better validation loss
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ConfigError(f"--size is {self.size!r}; expected one of {', '.join(SIZES)}")
        for name in ("steps", "batch", "frames", "eval_every", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 1")
        for name in ("pretrain_steps", "teacher_steps", "tower_steps", "shift"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected 0 (none) or more")
        if self.pretrain_steps and (self.start or not self.tower_steps):
            raise ConfigError(
                "--pretrain-steps: expected a new captioner (no --from) whose tower is then trained (--tower-steps)"
            )
        if self.behaviour < 0 or self.behaviour == 1:
            raise ConfigError(f"--behaviour is {self.behaviour}; expected 0 (none) or at least 2 taste words")
        if self.behaviour_likes < 1:
            raise ConfigError(f"--behaviour-likes is {self.behaviour_likes}; expected at least 1")
        if not 0 < self.valid_share < 0.5:
            raise ConfigError(f"--valid-share is {self.valid_share}; expected a share between 0 and 0.5")


def train_captioner(
    data: Path, out: Path, config: CaptionerConfig, *, texts: Mapping[int, str] | None = None
) -> dict[str, Any]:
    """Fit a captioner on the training items of the data set `data` and write it to the folder `out`.

    With `texts`, on exactly these items with these captions: an evaluation has splits of its own, and puts taste words
    in itself (`trainer.behaviour`).

    A run that was interrupted continues when called again with the same arguments; a finished one returns its
    record at once. Items after the split (`trainer.splits.training_items`) are never read, except their pictures where
    `pretrain_unseen` says so. Taste words come from the training part of the log, before its validation part.

    Returns:
        The record of the run, also in `out/record.json`.

    Raises:
        ConfigError: `out` holds a run with another configuration; `texts` together with `behaviour`.
        DataError: no training item has both media and text, or too few have likes.
    """
    if texts is not None and config.behaviour:
        raise ConfigError("taste words: `texts` are taken as they are; put the words in there, or set behaviour to 0")
    read_record(data)  # says what is wrong with a folder that is no data set, before anything is made
    plan = json.loads(json.dumps({**asdict(config), "data": _identity(data, texts)}, default=str))
    out.mkdir(parents=True, exist_ok=True)
    if (out / "plan.json").exists() and json.loads((out / "plan.json").read_text()) != plan:
        raise ConfigError(f"{out} holds a run with other settings or data; choose another --out or remove it")
    (out / "plan.json").write_text(json.dumps(plan, indent=2))
    if (out / "record.json").exists():
        finished: dict[str, Any] = json.loads((out / "record.json").read_text())
        return finished
    run = _Run(data, out, config, texts)
    record = {**plan, **run.fit()}
    part = out / "record.json.part"
    part.write_text(json.dumps(record, indent=2))
    part.replace(out / "record.json")
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return record


class _Run:
    def __init__(self, data: Path, out: Path, config: CaptionerConfig, texts: Mapping[int, str] | None) -> None:
        self.out, self.config = out, config
        items, interactions, record = read_items(data), read_interactions(data), read_record(data)
        if texts is None:
            split = Split.of(record, micros(interactions["timestamp"])) if interactions.num_rows else None
            may = training_items(items, interactions, record, split, config.seed)
            text = dict(zip(items["item_id"].to_pylist(), items["text"].to_pylist(), strict=True))
            if config.behaviour:
                text = _with_taste(text, items["item_id"].to_numpy()[may], interactions, split, config)
        else:
            may = np.isin(items["item_id"].to_numpy(), list(texts))
            text = dict(texts)
        ids = [int(i) for i in items["item_id"].to_numpy()[may] if text[int(i)]]
        if not ids:
            raise DataError(
                f"{data}/items.parquet: expected training items with `text` and media, found none"
            )

        if config.start is None:
            tokenizer = train_tokenizer(text[i] for i in ids)
            self.model = new_captioner(config.size, tokenizer, config.seed)
            self._save(tokenizer, "untrained", max_new_tokens=64)
        else:
            self.model = LlavaForConditionalGeneration.from_pretrained(config.start, dtype=torch.float32)
            tokenizer = Tokenizer.from_file(str(config.start / "tokenizer.json"))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            own = config.start / "sightline.json"
            template = json.loads(own.read_text())["prompt"] if own.exists() else LLAVA_PROMPT
            self._save(tokenizer, "untrained", max_new_tokens=64, prompt=template, copy_from=config.start)
        self.tokenizer = tokenizer
        self.prompt = CaptionPrompt.from_pretrained(out)
        self.image_tokens = image_tokens(self.model)
        self.source = (data, items)
        mute: list[int] = []  # pictures without captions, behind those with one
        if config.pretrain_steps:
            looked_at = items["item_id"].to_numpy()[may | config.pretrain_unseen]
            mute = sorted(set(looked_at.tolist()) - set(ids))
        self.pixels = Pixels(MediaReader(data, items), [*ids, *mute], MediaSpec.from_pretrained(out))
        captioned = int(np.isin(self.pixels.ids, ids).sum())
        self.mute = np.arange(captioned, len(self.pixels))
        self.targets = Targets([text[i] for i in self.pixels.ids[:captioned]], tokenizer, self.prompt.end_id)
        order = np.random.default_rng([config.seed, 0]).permutation(captioned)
        held = max(1, int(len(order) * config.valid_share))
        self.valid, self.train = np.sort(order[:held]), np.sort(order[held:])
        if not len(self.train):
            raise DataError(
                f"{data}: expected at least two training items with usable media, found {len(order)}"
            )
        # Changed colours are right only where captions name colours, by words that can be left out of the targets;
        # elsewhere (skin tones, moods of posters) the caption would become wrong.
        named = self.targets.is_colour.any(1).float().mean()
        self.check = [int(i) for i in items["item_id"].to_numpy()[~may]][:CHECK_ITEMS]
        mix = Augmentation.colour_mix if named > 0.5 else 0.0
        self.augment = Augmentation(shift=config.shift, colour_mix=mix, flip=not self.targets.sides)

    def fit(self) -> dict[str, Any]:
        began = time.monotonic()
        config, model = self.config, self.model
        history: dict[str, list[dict[str, float]]] = {}
        if config.start is None and config.tower_steps:
            start_tower(model, self.pixels, self.train, config.seed)
            if config.pretrain_steps:
                masked, pictures = Masked(model), np.concatenate([self.train, self.mute])
                loss = self._pixel_loss(masked)
                history["pretrain"] = self._phase("pretrain", masked, config.pretrain_steps, loss, pictures)
            words, teacher = len(self.targets.words), None
            if config.teacher_steps:
                teacher = Words(Convolutions(), Convolutions.width, words, config.frames)
                history["teacher"] = self._phase("teacher", teacher, config.teacher_steps, self._word_loss(teacher))
            tower = Words(Patches(model), model.config.vision_config.hidden_size, words, config.frames)
            history["tower"] = self._phase("tower", tower, config.tower_steps, self._word_loss(tower, teacher))
            self._save_words(tower)
        # As in LLaVA, the tower is frozen once it can see; its backward pass would be a third of the time.
        model.model.vision_tower.requires_grad_(config.start is not None)
        history["caption"] = self._phase("caption", model, config.steps, self._caption_loss)
        held_out = Pixels(MediaReader(*self.source), self.check, MediaSpec.from_pretrained(self.out))
        np.savez_compressed(self.out / "check.npz", frames=held_out.frames)
        digest = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
        if (self.out / WORDS).exists():  # captions with confidences are of the classifier, too
            with np.load(self.out / WORDS) as held:
                digest.update(b"".join(name.encode() + held[name].tobytes() for name in sorted(held.files)))
        version = digest.hexdigest()[:12]
        own = json.loads((self.out / "sightline.json").read_text())
        self._save(
            self.tokenizer, version, max_new_tokens=self.targets.length + 4, prompt=own["prompt"],
            copy_from=config.start,
        )  # fmt: skip
        return {
            "version": version,
            "items": {"train": len(self.train), "valid": len(self.valid), "without_caption": len(self.mute)},
            "parameters": sum(p.numel() for p in model.parameters()),
            "history": history,
            "kept": {name: min(looks, key=lambda h: h["valid_loss"])["step"] for name, looks in history.items()},
            "final_loss": history["caption"][-1]["train_loss"],
            "valid_loss": min(h["valid_loss"] for h in history["caption"]),
            "seconds": round(time.monotonic() - began, 1),
        }

    # --- losses: (rows, generator of augmentation or None) → scalar ----------------------------------

    def _pixel_loss(self, model: Masked) -> Callable[[np.ndarray, np.random.Generator | None], Tensor]:
        """What hidden patches look like; the same ones at every look at held-out items."""

        def loss(rows: np.ndarray, rng: np.random.Generator | None) -> Tensor:
            x = self.pixels.batch(rows)
            if rng:
                x, _ = self.augment(x, rng)
            x = self.pixels.normalised(x)
            order = (rng or np.random.default_rng([self.config.seed, 5])).uniform(size=(len(x), model.patches))
            return model(x, torch.from_numpy(order.argsort(1) < MASKED * model.patches))

        return loss

    def _word_loss(
        self, model: Words, teacher: Words | None = None
    ) -> Callable[[np.ndarray, np.random.Generator | None], Tensor]:
        """Which caption words a picture has. With a teacher its answers are the targets, also on mixtures of pictures,
        of which there are as many as steps: labels of few pictures are learnt by heart."""

        def loss(rows: np.ndarray, rng: np.random.Generator | None) -> Tensor:
            x = self.pixels.batch(rows)
            true_colours = torch.ones(len(rows), dtype=torch.bool)
            if rng:
                x, true_colours = self.augment(x, rng)
            if rng and teacher is not None:
                share = float(rng.beta(0.8, 0.8))
                x = share * x + (1 - share) * x.roll(1, 0)
                with torch.no_grad():
                    target = torch.sigmoid(teacher(self.pixels.normalised(x), frames=x.shape[1]))
                known = torch.ones_like(target, dtype=torch.bool)
            else:
                target = self.targets.bag(rows)
                known = self.targets.known(rows, true_colours)
            logits = model(self.pixels.normalised(x), frames=x.shape[1])
            lost = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            return (lost * known).sum(1).mean()

        return loss

    def _save_words(self, tower: Words) -> None:
        """`words.npz`: the classifier of caption words on the tower; how frequent each word is in training, among items
        where it is known; which words are of taste."""
        targets = self.targets
        pieces = [self.tokenizer.id_to_token(int(word)) for word in targets.words]
        known = targets.known(self.train, torch.ones(len(self.train), dtype=torch.bool))
        rate = (targets.bag(self.train) * known).sum(0) / known.sum(0).clamp(min=1)
        np.savez(
            self.out / WORDS, words=np.array(pieces), rate=rate.numpy(), frames=self.config.frames,
            weight=tower.head.weight.detach().numpy(), bias=tower.head.bias.detach().numpy(),
            taste=targets.word_is_taste.numpy(),
        )  # fmt: skip

    def _caption_loss(self, rows: np.ndarray, rng: np.random.Generator | None) -> Tensor:
        x = self.pixels.batch(rows)
        true_colours = torch.ones(len(rows), dtype=torch.bool)
        if rng:
            x, true_colours = self.augment(x, rng)
        labels = self.targets.labels(rows, true_colours)
        tokens = self.image_tokens * x.shape[1]
        ids, labels = model_inputs(self.prompt, tokens, labels, self.targets.ids[rows])
        keep = self.targets.length + 1
        out = self.model(
            input_ids=ids, pixel_values=self.pixels.normalised(x), attention_mask=torch.ones_like(ids),
            logits_to_keep=keep,
        )  # fmt: skip
        logits, wanted = out.logits[:, :-1], labels[:, 1 - keep :]
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE)

    # --- loop ----------------------------------------------------------------------------------------

    def _phase(
        self,
        name: str,
        module: nn.Module,
        steps: int,
        loss_of: Callable[[np.ndarray, np.random.Generator | None], Tensor],
        rows: np.ndarray | None = None,
    ) -> list[dict[str, float]]:
        """Train `module` on `rows` (of `self.train`, if not given), give it its best weights, return its history."""
        config = self.config
        optimizer = Optimizer(
            module, lr=config.lr, muon_lr=0.0 if config.start else config.muon_lr, steps=steps
        )
        step, history, stale = 0, [], 0
        best: dict[str, Any] = {"valid_loss": float("inf"), "model": {}}
        checkpoint = self.out / "checkpoint.pt"
        state = torch.load(checkpoint, weights_only=False) if checkpoint.exists() else None
        if state and state["phase"] != name and name in state["done"]:
            module.load_state_dict(state["done"][name]["model"], strict=False)
            module.eval()
            return list(state["done"][name]["history"])
        if state and state["phase"] == name:
            module.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step, history, stale, best = state["step"], state["history"], state["stale"], state["best"]
            log.info("continuing %s at step %d of %d", name, step, steps)
        done = state["done"] if state else {}
        groups = list(self.pixels.by_length(self.train if rows is None else rows))
        # The decoder has to compare frames for words of motion, so it sees images and videos equally often;
        # the tower sees the rarer kind, mostly videos, only somewhat oftener.
        weight = np.ones(len(groups)) if name == "caption" else np.sqrt([len(g) for g in groups])
        saved, smooth = time.monotonic(), None
        module.train()
        progress = tqdm(total=steps, initial=step, desc=name, unit="step", mininterval=2)
        while step < steps and stale < config.patience:
            rng = np.random.default_rng([config.seed, 1 + len(done), step])
            group = groups[rng.choice(len(groups), p=weight / weight.sum())]
            frames = int(self.pixels.counts[group[0]])
            size = max(1, config.batch * 2 // (frames + 1))
            loss = loss_of(rng.choice(group, size, replace=len(group) < size), rng)
            optimizer.step(loss, step)
            step += 1
            value = float(loss.detach())
            smooth = value if smooth is None else 0.95 * smooth + 0.05 * value
            progress.update()
            progress.set_postfix(loss=f"{smooth:.3f}", refresh=False)
            if step % config.eval_every == 0 or step == steps:
                valid = self._valid_loss(module, name, loss_of)
                history.append({"step": step, "train_loss": value, "valid_loss": valid})
                stale += 1
                if valid < best["valid_loss"]:
                    weights = {key: value.detach().clone() for key, value in module.state_dict().items()}
                    stale, best = 0, {"valid_loss": valid, "step": step, "model": weights}
            if time.monotonic() - saved > config.checkpoint_seconds or step == steps:
                self._checkpoint(
                    phase=name, step=step, model=module.state_dict(), optimizer=optimizer.state_dict(),
                    history=history, stale=stale, best=best, done=done,
                )  # fmt: skip
                saved = time.monotonic()
        progress.close()
        if not best["model"]:
            raise ConfigError(f"{name}: the loss on held-out items is no number; start again with a lower --lr")
        log.info("%s: ends at step %d of %d, best on held-out items at %d", name, step, steps, best["step"])
        module.load_state_dict(best["model"])
        done = {**done, name: {"model": best["model"], "history": history}}
        self._checkpoint(phase="", done=done)
        module.eval()
        return history

    @torch.no_grad()
    def _valid_loss(
        self,
        module: nn.Module,
        name: str,
        loss_of: Callable[[np.ndarray, np.random.Generator | None], Tensor],
    ) -> float:
        module.eval()
        losses, sizes = [], []
        for group in self.pixels.by_length(self.valid):
            for rows in np.array_split(group, -(-len(group) // self.config.batch)):
                losses.append(float(loss_of(rows, None)))
                sizes.append(len(rows))
        module.train()
        return float(np.average(losses, weights=sizes))

    def _checkpoint(self, **state: Any) -> None:
        part = self.out / "checkpoint.pt.part"
        torch.save(state, part)
        os.replace(part, self.out / "checkpoint.pt")

    def _save(self, tokenizer: Tokenizer, version: str, **options: Any) -> None:
        save_captioner(self.model, tokenizer, self.out, version=version, frames=self.config.frames, **options)


def _with_taste(
    texts: Mapping[int, str | None], items: np.ndarray, interactions: pa.Table, split: Split | None,
    config: CaptionerConfig,
) -> dict[int, str | None]:  # fmt: skip
    """Texts, followed by taste words of the training part of the log."""
    if split is None:
        raise DataError("--behaviour: expected a data set with interactions, found none; taste words come from likes")
    fitted = split.assign(0, micros(interactions["timestamp"])).part == TRAIN
    columns = (interactions[name].to_numpy()[fitted] for name in ("user_id", "item_id", "label"))
    words = behaviour_words(
        *columns, items=items, clusters=config.behaviour, min_likes=config.behaviour_likes, seed=config.seed,
        terciles=config.behaviour_terciles,
    )  # fmt: skip
    return {**texts, **with_behaviour({item: text for item, text in texts.items() if text}, words)}


def _identity(data: Path, texts: Mapping[int, str] | None) -> str:
    """A data set's identity for resuming: its record, its tables' size, and the captions where they were chosen."""
    size = sum(table.stat().st_size for table in data.glob("*.parquet"))
    chosen = "" if texts is None else json.dumps(sorted(texts.items()))
    return hashlib.sha256((data / "dataset.json").read_bytes() + f"{size}{chosen}".encode()).hexdigest()[:12]
