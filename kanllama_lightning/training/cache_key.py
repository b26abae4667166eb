"""What cached activations depend on, so that no run trains on those of something else."""

from hashlib import sha256
from pathlib import Path

from kanllama_lightning.data.shards import Key
from kanllama_lightning.data.token_data import TokenData
from kanllama_lightning.data.vocabulary import vocab_hash
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.storage.fingerprint import fingerprint

FORMAT = 1
WEIGHTS = (".safetensors", ".bin")


def cache_key(lm: FrozenLM, data: TokenData) -> Key:
    """LM, hook point and text; no head, budget or seed: those may differ between runs.

    Args:
        lm: Its weights need not be loaded.
        data: Set up for `fit`: the share held out is known then.
    """
    encoder = data.encoder
    return {
        "format": FORMAT,
        "lm": _weights(lm),
        "lm.dtype": str(lm.dtype).removeprefix("torch."),
        "lm.hook_point": lm.hook.name,
        **({"lm.input_point": lm.input.name} if lm.input else {}),
        "d_model": lm.d_row,
        "tokenizer": vocab_hash(encoder.tokenizer),
        "special tokens": [encoder.bos, encoder.eos, *encoder.special],
        "data.ctx_len": data.ctx_len,
        "data.append_eos": encoder.eos is not None,
        "held out": data.val_fraction,
        **_validated(data),
        **{f"data.train.{k}": v for k, v in data.train_corpus.description().items()},
    }


def _validated(data: TokenData) -> dict[str, str]:
    """A hash of the documents not trained on because they are in `val`; empty if there is none."""
    if not data.validated_shares:
        return {}
    shares = ",".join(map(str, sorted(data.validated_shares)))
    return {"not trained on": f"sha256:{sha256(shares.encode()).hexdigest()}"}


def _weights(lm: FrozenLM) -> str:
    """Hub name and commit, or a fingerprint of the files of a local folder."""
    folder = Path(lm.path)
    if lm.gguf:
        return fingerprint([lm.gguf.path])
    if not folder.is_dir():
        return f"{lm.path}@{getattr(lm.config, '_commit_hash', None) or lm.revision}"
    files = [f for f in sorted(folder.iterdir()) if f.suffix in WEIGHTS]
    return fingerprint([folder / "config.json", *files])
