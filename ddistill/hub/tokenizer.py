"""Texts as numbers, by the tokenizers library, with the numbers that transformers' tokenizers give."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddistill.hub.configs import read_json

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""What settings call the tokens that are matched in a text as they are."""

CLIP = {"bos_token": "<|startoftext|>"} | dict.fromkeys(["eos_token", "unk_token", "pad_token"], "<|endoftext|>")
"""CLIP's, where its folder does not say."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tokens:
    """Texts as numbers: ids [B, L], and mask [B, L], 1 for tokens and 0 for padding; int32."""

    ids: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Tokenizer:
    """Texts to `Tokens` of one length, cut or padded to it. Make one with `open_tokenizer`.

    backend: a tokenizers.Tokenizer that cuts and pads. prepare: done to each text first.
    """

    backend: Any
    prepare: Callable[[str], str] = str

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """B texts -> Tokens of [B, L]. Raises ValueError for one text that is in no list, and for no texts."""
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"give a list of texts, [{texts!r}]" if len(texts) else "give at least one text")
        encodings = self.backend.encode_batch([self.prepare(text) for text in texts])
        ids, mask = ([getattr(e, name) for e in encodings] for name in ("ids", "attention_mask"))
        return Tokens(np.asarray(ids, np.int32), np.asarray(mask, np.int32))


def open_tokenizer(folder: Path | str, length: int, prepare: Callable[[str], str] = str) -> Tokenizer:
    """The tokenizer in a folder that transformers saved, cutting and padding to `length` tokens.

    tokenizer.json is read as it is; without it vocab.json and merges.txt are CLIP's byte pairs (Radford et al. 2021).
    Raises FileNotFoundError for a folder with neither, saying what to do where it holds a spiece.model; ValueError
    without a token to pad with and for a length without room for a text; ImportError without the tokenizers library.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError('texts need the tokenizers library: pip install "ddistill[text]"') from error
    folder = Path(folder)
    settings = tokenizer_settings(folder)
    if (folder / "tokenizer.json").is_file():
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        settings = CLIP | settings
        backend = _clip(folder, settings)
    else:
        raise FileNotFoundError(no_tokenizer(folder))

    listed = sorted((int(number), token) for number, token in settings.get("added_tokens_decoder", {}).items())
    added = {token["content"]: _added(token) for _, token in listed}
    for given in (settings[key] for key in SPECIAL if settings.get(key)):
        added.setdefault(_text(given), _added(given))
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in added.values():
        if token.content not in there:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])

    pad = _text(settings["pad_token"]) if settings.get("pad_token") else (backend.padding or {}).get("pad_token")
    number = None if pad is None else backend.token_to_id(pad)
    if number is None:
        raise ValueError(f"{folder} names no pad_token of its vocabulary, and texts are padded to {length} tokens")
    if length <= backend.num_special_tokens_to_add(False):
        raise ValueError(f"{length} tokens leave no room for a text: give a greater length")
    backend.enable_truncation(length, direction=settings.get("truncation_side", "right"))
    backend.enable_padding(
        length=length, pad_id=number, pad_token=pad, direction=settings.get("padding_side", "right")
    )  # fmt: skip
    return Tokenizer(backend, prepare)


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; unless it lists its added tokens, special_tokens_map.json overrules it (transformers)."""
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file() and "added_tokens_decoder" not in settings:
            settings |= read_json(folder / name, "the settings of a tokenizer")
    return settings


def _text(token: Any) -> str:
    return token if isinstance(token, str) else token["content"]


def _added(token: Any) -> Any:
    """A token as settings name it: its text alone, or with how it is matched."""
    from tokenizers import AddedToken

    flags = {} if isinstance(token, str) else {k: v for k, v in token.items() if not k.startswith("_")}
    return AddedToken(**{"special": True, **flags, "content": _text(token)})


def _clip(folder: Path, settings: dict[str, Any]) -> Any:
    """CLIP's byte pairs with their end of word: letters, single digits and runs of anything else are words."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = read_json(folder / "vocab.json", "the vocabulary of a tokenizer")
    lines = (folder / "merges.txt").read_text("utf-8").splitlines()
    pairs = [tuple(line.split()) for line in lines if not line.startswith("#version")]
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    bos, eos, unknown = (_text(settings[key]) for key in ("bos_token", "eos_token", "unk_token"))
    absent = [token for token in (bos, eos) if token not in vocabulary]
    if absent:
        raise ValueError(f"{folder / 'vocab.json'} lacks {' and '.join(absent)}, which texts begin and end with")
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.post_processor = processors.RobertaProcessing(
        (eos, vocabulary[eos]), (bos, vocabulary[bos]), trim_offsets=False, add_prefix_space=False
    )
    return backend


def no_tokenizer(folder: Path) -> str:
    """What a folder without a tokenizer that can be read has, and what to do where there is a remedy."""
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if "spiece.model" in there:
        return (
            f"{folder} has a spiece.model but no tokenizer.json, and the tokenizers library reads only that. Make it "
            'once, where transformers, sentencepiece and protobuf are installed: python -c "from transformers import '
            f"T5TokenizerFast as T; T.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    return f"{folder} has neither tokenizer.json nor vocab.json and merges.txt, only {', '.join(there) or 'nothing'}"
