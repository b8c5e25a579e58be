"""Which tokenizer a model's numbers mean: it travels with the weights, and another one is never guessed.

    a folder, a GGUF file      holds its own
    a .pth file of ours        its record names the tokenizer by its fingerprint, the sha256 of all that decides token
                               ids: either the one in model/minimind_tokenizer, or the folder beside the weights that
                               is called after it, out/tokenizer-1a2b3c4d
    a .pth file of others      says nothing: the one in model/minimind_tokenizer, if the numbers of tokens are equal

With --tokenizer_path the user says it.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .chat_format import ChatFormat
from .LMConfig import LMConfig, config_fields
from .loading import TOKENIZER_DIR, check_vocabulary, load_tokenizer
from .record import read_record


def tokenizer_of(weights: Path | None, vocab_size: int, chosen: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        weights: where the model comes from; None for a new one.
        vocab_size: rows of its embedding; of no meaning for a new one.
        chosen: the directory of another tokenizer (--tokenizer_path).

    Raises:
        FileNotFoundError: there is none in the folder, or none beside the weights of the fingerprint in their record.
        ValueError: it is damaged, not the one of the record, or has more tokens than the model.
    """
    if weights is None:
        return load_tokenizer(chosen or TOKENIZER_DIR)
    tokenizer = load_tokenizer(chosen) if chosen else _own(weights, vocab_size)
    check_vocabulary(weights, tokenizer, vocab_size)
    return tokenizer


def _own(weights: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    if weights.is_dir():
        return load_tokenizer(weights)
    if weights.suffix == ".gguf":
        from .gguf_reader import gguf_tokenizer  # and with it the package, which is optional

        return gguf_tokenizer(weights)
    tokenizer = load_tokenizer()
    record, _ = read_record(weights)
    fingerprint = record and record.get("tokenizer")
    if not fingerprint or not isinstance(fingerprint, str):
        if len(tokenizer) != vocab_size:
            raise ValueError(
                f"{weights} has rows for {vocab_size} tokens, but the tokenizer in {TOKENIZER_DIR} has "
                f"{len(tokenizer)}, so it was trained with another one: pass that one with --tokenizer_path"
            )
        return tokenizer
    if ChatFormat(tokenizer).fingerprint() == fingerprint:
        return tokenizer
    place = _place(weights.parent, fingerprint)
    if not place.is_dir():
        raise FileNotFoundError(
            f"{weights} was trained with another tokenizer or chat template than the one in {TOKENIZER_DIR}, and "
            f"{place} is not there: copy that folder too, or pass the tokenizer with --tokenizer_path"
        )
    tokenizer = load_tokenizer(place)
    if ChatFormat(tokenizer).fingerprint() != fingerprint:
        raise ValueError(f"{place} was changed since {weights} was written: copy it again, or pass --tokenizer_path")
    return tokenizer


def is_shipped(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it is the one in model/minimind_tokenizer, wherever it was read."""
    if Path(tokenizer.name_or_path) == TOKENIZER_DIR:
        return True
    return ChatFormat(tokenizer).fingerprint() == ChatFormat(load_tokenizer()).fingerprint()


def keep_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> str:
    """Save a tokenizer beside weights that are written to `directory`, unless it is there, or is the shipped one.

    Returns:
        Its fingerprint, for the record of the weights. Raises OSError: the disk is full or not writable.
    """
    from .folders import new_folder  # and with it a table of every architecture, which --help does not need

    fingerprint = ChatFormat(tokenizer).fingerprint()
    place = _place(directory, fingerprint)
    if not is_shipped(tokenizer) and not place.is_dir():
        with new_folder(place) as temporary:
            tokenizer.save_pretrained(temporary)
    return fingerprint


def with_token_ids(config: LMConfig, tokenizer: PreTrainedTokenizerBase) -> LMConfig:
    """A configuration with the numbers that its control tokens have in the tokenizer."""
    fields = config_fields(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        number = getattr(tokenizer, name)
        if number is not None:
            fields[name] = number
    return LMConfig(**fields)


def _place(directory: Path, fingerprint: str) -> Path:
    return directory / f"tokenizer-{fingerprint[:8]}"
