"""Make the embedded model from the generator alone: a tokenizer and a small trained Llama.

Run `python -m kanllama_lightning.embedded.build`; the files go to `embedded/model/`. An
interrupted run goes on from its last checkpoint when it is started again.
"""

import argparse
import json
import logging
import math
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import transformers
from jaxtyping import Float, Int
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kanllama_lightning.embedded import MODEL_DIR, Story, story

log = logging.getLogger(__name__)

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
FIRST_TRAINING_STORY = 1_000_000_000
"""Stories below this index are left to the users of the model."""
VALIDATION_SEED = 1
ROW_TOKENS = 256
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(seed: int, n_stories: int, vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Llama 3's conventions, trained on the first training stories."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (story(seed, FIRST_TRAINING_STORY + i).text for i in range(n_stories))
    inner.train_from_iterator(texts, trainer)
    bos = inner.token_to_id(BOS)
    inner.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained Llama of about a million parameters.

    The tied embedding starts large and the final norm small: the blocks then see which token they
    stand on, while the first logits stay small. Started small, the embedding drowns in the blocks'
    output, and copying a name from earlier in a story takes four times the tokens to learn.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.04,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=0.3)
        model.model.norm.weight.fill_(0.25)
    return model


class Stream:
    """Packed rows of fresh stories: BOS, a story, EOS, the next; each row starts with BOS.

    Every other row begins with a new story, and the rest of the last is dropped: otherwise nearly
    every row would begin inside a story, and the model take the BOS of a row for a sign of that.

    Args:
        tokenizer: Tokenizer.
        seed: Seed of the stories.
        index: Number of the next story to read.
        rest: Token ids left over from the stories read so far.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, seed: int, index: int, rest: list[int]
    ) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.index = index
        self.rest = rest

    def rows(self, n_rows: int) -> Int[Tensor, "batch pos"]:
        """The next rows."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        rows: list[list[int]] = []
        while len(rows) < n_rows:
            while len(self.rest) < 4 * ROW_TOKENS:
                texts = [story(self.seed, self.index + i).text for i in range(16)]
                self.index += 16
                for ids in self.tokenizer(texts)["input_ids"]:
                    self.rest += [*ids, eos]
            if len(rows) % 2 == 0:
                self.rest = self.rest[self.rest.index(bos) :]
            # A row that would start inside a story gets a BOS of its own.
            start = [] if self.rest[0] == bos else [bos]
            taken = ROW_TOKENS - len(start)
            rows.append(start + self.rest[:taken])
            self.rest = self.rest[taken:]
        return torch.tensor(rows)


def next_token_loss(
    model: LlamaForCausalLM, ids: Int[Tensor, "batch pos"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Summed cross-entropy in nats of every token given those before it; -100 does not count."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets[:, 1:].reshape(-1), reduction="sum"
    )


class Score(NamedTuple):
    """How a model does on whole stories, against what is possible."""

    stories: int
    tokens_per_story: float
    """Predicted tokens: those of the text, and EOS."""
    ce: float
    """Cross-entropy of the model, in nats per token."""
    entropy: float
    """Mean of -log p of the same stories under the grammar, in nats per token."""
    entropy_se: float
    """Standard error of `entropy`, as an estimate of the grammar's entropy rate."""


@torch.no_grad()
def score(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stories: list[Story]
) -> Score:
    """The model's cross-entropy on whole stories, each read alone."""
    nats = 0.0
    lengths = []
    for at in range(0, len(stories), 16):
        texts = [s.text for s in stories[at : at + 16]]
        rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
        longest = max(map(len, rows))
        ids = torch.tensor([r + [tokenizer.eos_token_id] * (longest - len(r)) for r in rows])
        targets = torch.tensor([r + [-100] * (longest - len(r)) for r in rows])
        nats += next_token_loss(model, ids, targets).item()
        lengths += [len(r) - 1 for r in rows]
    total = sum(lengths)
    entropy = -sum(s.log_prob for s in stories) / total
    # A ratio of means; its standard error by the delta method.
    squares = sum((-s.log_prob - entropy * n) ** 2 for s, n in zip(stories, lengths, strict=True))
    return Score(
        len(stories), total / len(stories), nats / total, entropy, math.sqrt(squares) / total
    )


def held_out(n_stories: int) -> list[Story]:
    """Stories of a stream that is never trained on."""
    return [story(VALIDATION_SEED, i) for i in range(n_stories)]


def rate(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, a plateau, a linear fall in the last 60%."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (0.6 * steps))


def optimizers_for(model: LlamaForCausalLM, args: argparse.Namespace) -> list[Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms.

    Steps here are small and noisy; the decay keeps the matrices from growing on the noise.
    """
    inner = [p for n, p in model.named_parameters() if p.ndim > 1 and "embed_tokens" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed_tokens" in n]
    return [
        torch.optim.Muon(inner, lr=args.muon_lr, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]


class TrainedLM(NamedTuple):
    """How a model was trained, over all the sessions of its run."""

    sessions: list[dict[str, str | int]]
    """Command and first step of each start of the script."""
    tokens: int
    """Tokens seen."""
    seconds: float
    """Wall time."""


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> TrainedLM:
    """Train in place, going on from the last checkpoint if there is one."""
    optimizers = optimizers_for(model, args)
    peaks = [o.param_groups[0]["lr"] for o in optimizers]
    stream = Stream(tokenizer, args.seed, FIRST_TRAINING_STORY, [])
    checkpoint: Path = args.out / "checkpoint.pt"
    first, tokens, spent = 0, 0, 0.0
    sessions: list[dict[str, str | int]] = []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        stream.index, stream.rest = state["index"], state["rest"]
        first, tokens, spent = state["step"], state["tokens"], state["seconds"]
        sessions = state["sessions"]
        log.info("going on from step %d", first)
    sessions.append({"command": args.command, "from_step": first})
    model.train()
    begun, shown, nats = time.monotonic(), first, 0.0
    for step in range(first, args.steps):
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate(step, args.steps, args.warmup)
        ids = stream.rows(args.batch_rows)
        tokens += ids.numel()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = next_token_loss(model, ids, ids) / (ids.numel() - len(ids))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        nats += loss.item()
        seconds = spent + time.monotonic() - begun
        if (step + 1) % args.log_every == 0:
            log.info("step %d  loss %.4f  %.0f s", step + 1, nats / (step + 1 - shown), seconds)
            shown, nats = step + 1, 0.0
        if (step + 1) % args.checkpoint_every == 0:
            state = {"model": model.state_dict()}
            state["optimizers"] = [o.state_dict() for o in optimizers]
            state |= {"index": stream.index, "rest": stream.rest}
            state |= {"step": step + 1, "tokens": tokens, "seconds": seconds, "sessions": sessions}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    model.eval()
    return TrainedLM(sessions, tokens, round(spent + time.monotonic() - begun))


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--out", type=Path, default=MODEL_DIR, help="folder for the files")
    add("--seed", type=int, default=0, help="seed of the weights and of the training stories")
    add("--steps", type=int, default=4600, help="optimizer steps")
    add("--batch-rows", type=int, default=16, help=f"rows of {ROW_TOKENS} tokens in a step")
    add("--lr", type=float, default=3e-3, help="peak learning rate of AdamW")
    add("--muon-lr", type=float, default=0.01, help="peak learning rate of Muon")
    add("--bf16", action="store_true", help="compute in bfloat16, for CPUs that are fast at it")
    add("--warmup", type=int, default=50, help="steps of warm-up")
    add("--vocab", type=int, default=1024, help="size of the vocabulary")
    add("--tokenizer-stories", type=int, default=20_000, help="stories the tokenizer is made of")
    add("--val-stories", type=int, default=2000, help="held-out stories to validate on")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--log-every", type=int, default=100, help="steps between two lines of log")
    add("--checkpoint-every", type=int, default=500, help="steps between two checkpoints")
    args = parser.parse_args(argv)
    args.command = " ".join(["python -m kanllama_lightning.embedded.build", *argv])
    return args


def main(argv: list[str]) -> None:
    """Build everything."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.seed, args.tokenizer_stories, args.vocab)
    tokenizer.save_pretrained(args.out)
    model = new_model(tokenizer, args.seed)
    log.info("%d parameters", sum(p.numel() for p in model.parameters()))
    trained = train(model, tokenizer, args)
    model.save_pretrained(args.out)
    result = score(model, tokenizer, held_out(args.val_stories))
    log.info("validation %s", result)
    built = {
        "seed": args.seed,
        "steps": args.steps,
        "training": trained._asdict(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation_seed": VALIDATION_SEED,
        "validation": result._asdict(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (args.out / "BUILD.json").write_text(json.dumps(built, indent=2) + "\n")
    (args.out / "checkpoint.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    main(sys.argv[1:])
