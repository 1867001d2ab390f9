"""Train the small model on the stories in FOLDER.

    python -m checkpoints.storyteller.recipe.train FOLDER

transformers' own Qwen3 and a plain loop: AdamW, a warm-up and a cosine, bfloat16 where the device
has it. How many tokens it sees is settled at the start, by the speed of a few steps: what --minutes
allow, and at most EPOCHS tellings of each story. The state is saved every minute; called again, the
command goes on from there. At the end the state with the least held-out loss is written to
FOLDER/model in bfloat16, then judged and described (card.py); FOLDER/ship holds what is worth
keeping, in seven files. If time runs out first, that is done with what there is, and the command
ends with status 3: called again, it trains on.

Documents in a row see those before them: at this size that costs nothing to speak of.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.storyteller.recipe.prepare import LENGTH, Rows, prepare
from checkpoints.storyteller.recipe.tokenizer import VOCAB_SIZE, save_tokenizer
from course.arguments import local_path, positive

SHAPE: dict[str, Any] = {  # 6.95 million parameters, 13.9 MB in bfloat16
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 1280,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": LENGTH,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GENERATION = {  # 2 ends a turn, 0 a text
    "eos_token_id": [2, 0],
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.7,
    "max_new_tokens": 300,
}
SAVE_EVERY = 60.0  # seconds
LOSS_EVERY = 200  # steps between two looks at what is held out
EPOCHS = 12  # tellings of each story, at most
PROBED = 12  # steps that are timed to settle the number of tokens
MARGIN = 0.88  # of the time that is left: what the plan fills
IGNORED = -100  # cross_entropy's label for what is not learned
BUCKET = 128  # positions


@dataclass(frozen=True)
class Recipe:
    """What one training run is: the same recipe on the same rows gives the same model."""

    tokens: int = 0  # to see, padding included; 0: settled by the data and the time
    copies: int = 4  # of each story in the rows, each asked for in other words
    batch: int = 64  # rows of LENGTH tokens a step
    learning_rate: float = 2e-3
    warm_up: float = 0.03  # of all steps
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.batch * LENGTH))

    def rate(self, step: int) -> float:
        """The learning rate of a step: up in a line, then down a cosine to nothing."""
        rise = max(1, round(self.warm_up * self.steps))
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        fall = (step - rise) / max(1, self.steps - rise)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * fall))


TINY = Recipe(tokens=20 * 2 * LENGTH, copies=1, batch=2)


# -- the model and its loss ----------------------------------------------------------------------


def new_model(device: Any, seed: int) -> Any:
    """transformers' Qwen3ForCausalLM with random float32 weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE)).to(device)


def token_losses(model: Any, tokens: Any, learn: Any) -> Any:
    """The loss of each token, 0 where it is not learned: [rows, LENGTH - 1] float32.

    tokens [rows, LENGTH] int64, learn [rows, LENGTH] bool, on the model's device. A row's first
    token is never predicted. Shapes do not depend on what is learned, so that this compiles once.
    """
    import torch
    import torch.nn.functional as F

    bf16 = torch.autocast("cuda", torch.bfloat16) if tokens.is_cuda else nullcontext()
    with bf16:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    labels = torch.where(learn, tokens, IGNORED)[:, 1:]
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
    )
    return losses.view(labels.shape)


def mean_loss(model: Any, tokens: Any, learn: Any) -> Any:
    """The mean over what is learned."""
    return token_losses(model, tokens, learn).sum() / learn[:, 1:].sum()


def batches(rows: Rows, recipe: Recipe, first_step: int) -> Iterator[np.ndarray]:
    """Row numbers of each step from `first_step` on: every epoch in another order."""
    step, epoch_steps = first_step, max(1, len(rows.tokens) // recipe.batch)
    while step < recipe.steps:
        epoch, place = divmod(step, epoch_steps)
        order = np.random.default_rng((recipe.seed, epoch)).permutation(len(rows.tokens))
        for batch in range(place, min(epoch_steps, place + recipe.steps - step)):
            yield order[batch * recipe.batch : (batch + 1) * recipe.batch]
            step += 1


def on_device(rows: Rows, which: np.ndarray | slice, device: Any) -> tuple[Any, Any]:
    """Some rows' tokens [n, LENGTH] int64 and learn [n, LENGTH] bool, as tensors there."""
    import torch

    # As int16: few kernels know uint16, and all ids are below 4,096.
    tokens = torch.from_numpy(rows.tokens[which].view(np.int16))
    learn = torch.from_numpy(rows.learn[which])
    if torch.device(device).type == "cuda":  # so that the host need not wait for the copies
        tokens, learn = tokens.pin_memory(), learn.pin_memory()
    return tokens.to(device, non_blocking=True).long(), learn.to(device, non_blocking=True)


def loss_by_position(model: Any, rows: Rows, device: Any, batch: int) -> dict[str, float]:
    """Held-out loss in nats a token: "all", and "0-127" and so on by position in the row."""
    import torch

    total, number = np.zeros(LENGTH), np.zeros(LENGTH)
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(rows.tokens), batch):
            which = slice(start, start + batch)
            losses = token_losses(model, *on_device(rows, which, device))
            total[1:] += losses.sum(dim=0, dtype=torch.float64).cpu().numpy()
            number[1:] += rows.learn[which][:, 1:].sum(axis=0)
    model.train()
    found = {"all": total.sum() / number.sum()}
    for start in range(0, LENGTH, BUCKET):
        if count := number[start : start + BUCKET].sum():
            mean = total[start : start + BUCKET].sum() / count
            found[f"{start}-{start + BUCKET - 1}"] = mean
    return {name: float(value) for name, value in found.items()}


# -- training ------------------------------------------------------------------------------------


class Trainer:
    """The model, its optimizer and how far they have come; all of it can be saved and resumed."""

    def __init__(self, folder: Path, recipe: Recipe, rows: dict[str, Rows]):
        import torch

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.file, self.recipe, self.rows = folder / "state.pt", recipe, rows
        self.model = new_model(self.device, recipe.seed)
        self.loss = mean_loss
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=fused)
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []  # of held-out losses
        self.best: dict[str, Any] | None = None  # the state with the least of them
        if self.file.exists():
            self._resume()

    def _resume(self) -> None:
        import torch

        state = torch.load(self.file, map_location=self.device, weights_only=True)
        begun = Recipe(**state["recipe"])
        if begun != replace(self.recipe, tokens=self.recipe.tokens or begun.tokens):
            raise SystemExit(f"{self.file} was begun with another recipe: {begun}")
        self.recipe = begun
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.best = state["best"]

    def try_compile(self) -> None:
        """Compile the loss; where that fails, say so and go on without."""
        import torch

        compiled = torch.compile(mean_loss)
        try:
            start = time.perf_counter()
            compiled(self.model, *self._batch(np.arange(self.recipe.batch))).backward()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.loss = compiled
            print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
        except Exception as error:
            print(f"not compiled, {type(error).__name__}: {error!s:.300}", flush=True)
        self.optimizer.zero_grad(set_to_none=True)

    def settle_tokens(self, deadline: float) -> None:
        """Time a few steps that change nothing; plan what fits, and at most EPOCHS tellings."""
        seconds = self._seconds_a_step()
        steps = int(MARGIN * max(0.0, deadline - time.perf_counter()) / seconds)
        rows = EPOCHS * len(self.rows["train"].tokens) // self.recipe.copies
        steps = max(1, min(steps, -(-rows // self.recipe.batch)))
        self.recipe = replace(self.recipe, tokens=steps * self.recipe.batch * LENGTH)
        print(
            f"{1000 * seconds:.1f} ms a step: {steps:,} steps, {self.recipe.tokens:,} tokens, "
            f"{steps * self.recipe.batch * self.recipe.copies / len(self.rows['train'].tokens):.1f}"
            f" tellings of each story, about {steps * seconds / 60:.1f} minutes",
            flush=True,
        )

    def _seconds_a_step(self) -> float:
        """The median of a few steps at learning rate 0; the optimizer forgets them."""
        import torch

        which = np.arange(self.recipe.batch)
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        empty = self.optimizer.state_dict()
        times = []
        for _ in range(PROBED if self.device.type == "cuda" else 2):
            start = time.perf_counter()
            self._update(which, rate=0.0)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(empty)
        self.optimizer.state.clear()
        return float(np.median(times))

    def save(self) -> None:
        """Write the state beside its place, then rename: a cut never leaves half of one."""
        import torch

        state = {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "best": self.best,
        }
        scratch = self.file.with_suffix(".part")
        torch.save(state, scratch)
        scratch.rename(self.file)

    def train(self, deadline: float) -> bool:
        """Train until done or time.perf_counter() passes the deadline; whether it is done."""
        saved = begun = time.perf_counter()
        before, first = self.seconds, self.step
        for which in batches(self.rows["train"], self.recipe, self.step):
            if time.perf_counter() > deadline:
                break
            self._one_step(which)
            if self.step % LOSS_EVERY == 0 or self.step == self.recipe.steps:
                self._look(begun, first)
            if time.perf_counter() - saved > SAVE_EVERY:
                self.seconds = before + time.perf_counter() - begun
                self.save()
                saved = time.perf_counter()
        self.seconds = before + time.perf_counter() - begun
        self.save()
        return self.step == self.recipe.steps

    def _batch(self, which: np.ndarray) -> tuple[Any, Any]:
        rows = self.rows["train"]
        return on_device(rows, which % len(rows.tokens), self.device)

    def _one_step(self, which: np.ndarray) -> None:
        self._update(which, self.recipe.rate(self.step))
        self.step += 1

    def _update(self, which: np.ndarray, rate: float) -> None:
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.loss(self.model, *self._batch(which)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _look(self, begun: float, first: int) -> None:
        loss = self.held_out_loss()["all"]
        if not self.history or loss < min(seen["held_out_loss"] for seen in self.history):
            self.best = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.history.append({"step": self.step, "held_out_loss": loss})
        seconds = (time.perf_counter() - begun) / (self.step - first)
        print(
            f"step {self.step:,} of {self.recipe.steps:,}: held-out loss {loss:.4f}, "
            f"{self.recipe.batch * LENGTH / seconds:,.0f} tok/s, "
            f"{seconds * (self.recipe.steps - self.step) / 60:.1f} minutes to go",
            flush=True,
        )

    def take_best(self) -> None:
        """Go back to the weights with the least held-out loss."""
        if self.best is not None:
            self.model.load_state_dict(self.best)

    def held_out_loss(self) -> dict[str, float]:
        return loss_by_position(self.model, self.rows["held_out"], self.device, self.recipe.batch)


def export(model: Any, tokenizer_folder: Path, folder: Path) -> None:
    """Write the model in bfloat16 with its tokenizer and generation settings."""
    import torch
    from tokenizers import Tokenizer
    from transformers import GenerationConfig

    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(**GENERATION)
    model.save_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    save_tokenizer(tokenizer, folder, LENGTH)


# -- the command ---------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    import torch

    args = parse(arguments)
    deadline = time.perf_counter() + 60 * args.minutes
    recipe = TINY if args.tiny else Recipe()
    chosen = {name: getattr(args, name) for name in ("tokens", "batch", "learning_rate", "copies")}
    recipe = replace(recipe, **{name: value for name, value in chosen.items() if value})
    rows = prepare(args.folder, recipe.copies)
    print(f"{len(rows['train'].tokens):,} rows of {LENGTH:,} to train on", flush=True)
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(args.folder, recipe, rows)
    if args.compile if args.compile is not None else trainer.device.type == "cuda":
        trainer.try_compile()
    if not trainer.recipe.tokens:
        trainer.settle_tokens(deadline - 60 * args.reserve)
    done = trainer.train(deadline - 60 * args.reserve)
    if not done:
        print(f"step {trainer.step:,} of {trainer.recipe.steps:,}: call again to go on", flush=True)
    finish(trainer, args)
    return 0 if done else 3


def finish(trainer: Trainer, args: argparse.Namespace) -> None:
    """Write the model; then judge it, describe it, and gather what is worth keeping."""
    import torch

    from checkpoints.storyteller.recipe.card import judge, write_card
    from checkpoints.storyteller.recipe.ship import ship

    trainer.take_best()
    losses, record = trainer.held_out_loss(), describe(trainer, args.folder)
    record["held_out_loss"] = losses
    export(trainer.model, args.folder / "data" / "tokenizer", args.folder / "model")
    file = args.folder / "training.json"
    file.write_text(json.dumps(record, indent=2) + "\n")
    ship(args.folder)  # before judging, and again after it: whatever happens, the model is there
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()  # the engine sizes its cache by what is free
    record["judged"] = judge(args.folder / "model", args.judged)
    file.write_text(json.dumps(record, indent=2) + "\n")
    write_card(args.folder, record)
    ship(args.folder)
    print(f"held-out loss {losses['all']:.4f}; the model is in {args.folder / 'model'}")


def describe(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """What the run was: for the record and the card."""
    from course.machine import describe as describe_machine
    from course.machine import versions

    return {
        "machine": describe_machine(trainer.device.type),
        "versions": versions(),
        "recipe": {**asdict(trainer.recipe), "steps": trainer.recipe.steps},
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "data": json.loads((folder / "data" / "report.json").read_text()),
        "steps_done": trainer.step,
        "seconds": trainer.seconds,
        "compiled": trainer.loss is not mean_loss,
        "history": trainer.history,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    prog = "checkpoints.storyteller.recipe.train"
    parser = argparse.ArgumentParser(description=__doc__, prog=prog)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=local_path, help="the one that generate wrote to")
    parser.add_argument("--minutes", type=float, default=8.0, help="then stop (default: 8)")
    parser.add_argument(
        "--reserve", type=float, default=1.0, help="of them for judging (default: 1)"
    )
    parser.add_argument("--tiny", action="store_true", help="20 short steps: does it all run?")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="use torch.compile (default: on a GPU); where that fails, training goes on without",
    )
    parser.add_argument("--judged", type=positive, default=200, help="stories (default: 200)")
    for name in ("tokens", "batch", "copies"):
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=f"Recipe.{name}")
    parser.add_argument("--learning-rate", type=float, help="Recipe.learning_rate")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
