"""Textual inversion: new words whose embeddings train while the table of the known ones stays as it is.

Gal et al. 2022, arXiv 2208.01618 (code: github.com/rinongal/textual_inversion).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from visadapt.core.files import replacing, serialise
from visadapt.core.state import load_native, read

METADATA = "tokens"


@dataclass(frozen=True)
class NewToken:
    """A word that prompts may use from now on.

    Args:
        name: How prompts spell it, such as "<sks>".
        init: Word whose embedding it starts from; empty starts from random numbers of the table's deviation.
        vectors: Embeddings that it stands for.
    """

    name: str
    init: str = ""
    vectors: int = 1

    def __post_init__(self) -> None:
        if not self.name.strip() or re.search(r"\s", self.name) or self.vectors < 1:
            raise ValueError(
                f"model.tokens: '{self.name}' with {self.vectors} vectors; name one word, at least 1 vector"
            )

    def words(self) -> list[str]:
        """The word and its further vectors, ``name``, ``name_1``, …, as the stock pipelines name them."""
        return [self.name, *(f"{self.name}_{i}" for i in range(1, self.vectors))]


class ExtendedEmbedding(nn.Embedding):
    """A frozen table (V, D) with rows behind it that train.

    Attributes:
        weight: The table, the very parameter of the base.
        new_tokens: The further rows (n, D), float32.
        first: Number of the first new token.
    """

    new_tokens: nn.Parameter

    def __init__(self, table: nn.Embedding, rows: Tensor, first: int) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight.detach())
        self.weight = table.weight
        self.new_tokens = nn.Parameter(rows.float())
        self.first = first

    def forward(self, input: Tensor) -> Tensor:
        """Embeddings (…, D) in the table's precision."""
        new = input >= self.first
        known = F.embedding(input.masked_fill(new, 0), self.weight)
        learned = F.embedding((input - self.first).clamp_min(0), self.new_tokens)
        return torch.where(new[..., None], learned.to(known.dtype), known)


def add_tokens(model: Any, tokens: Sequence[NewToken]) -> None:
    """Teach the tokenizers and text encoders of a ``Diffusion`` new words.

    Raises:
        ValueError: A tokenizer has the word, or two tokens share one.
    """
    words = [word for token in tokens for word in token.words()]
    if len(set(words)) < len(words):
        raise ValueError(f"model.tokens: {', '.join(words)}: each word may come once")
    for tokenizer, encoder in _encoders(model):
        known = tokenizer.get_vocab()
        if taken := [word for word in words if word in known]:
            raise ValueError(
                f"model.tokens: the tokenizer knows '{taken[0]}'; choose another name, such as '<{taken[0]}>'"
            )
        table = encoder.get_input_embeddings()
        rows = torch.cat([_start(token, tokenizer, table.weight.detach().float()) for token in tokens])
        tokenizer.add_tokens(words)
        first = int(tokenizer.convert_tokens_to_ids(words[0]))
        extended = ExtendedEmbedding(table, rows.to(table.weight.device), first)
        _embeddings(encoder).token_embedding = extended
    model.new_tokens = list(tokens)


def _start(token: NewToken, tokenizer: Any, table: Tensor) -> Tensor:
    ids = tokenizer(token.init, add_special_tokens=False).input_ids if token.init.strip() else []
    if not ids:
        generator = torch.Generator().manual_seed(sum(token.name.encode()))
        return torch.randn(token.vectors, table.shape[1], generator=generator) * table.std().cpu()
    rows = table[ids].cpu()
    return rows if len(ids) == token.vectors else rows.mean(0).expand(token.vectors, -1).clone()


def _encoders(model: Any) -> Iterator[tuple[Any, Any]]:
    yield model.tokenizer, model.text_encoder
    if model.layout == "sdxl":
        yield model.tokenizer_2, model.text_encoder_2


def _embeddings(encoder: Any) -> Any:
    """The module that holds ``token_embedding``; transformers 5 has it one level higher than 4."""
    return getattr(encoder, "text_model", encoder).embeddings


def extended(model: nn.Module) -> list[ExtendedEmbedding]:
    """The extended tables of a model, none without new tokens."""
    return [module for module in model.modules() if isinstance(module, ExtendedEmbedding)]


def metadata(model: Any) -> dict[str, str]:
    """What an adapter file has to say about new tokens, for ``visadapt.save(..., extra=...)``."""
    tokens = getattr(model, "new_tokens", ())
    return {METADATA: json.dumps([asdict(token) for token in tokens])} if tokens else {}


def load_adapter(model: Any, path: str | Path, name: str | None = None) -> Any:
    """``visadapt.load`` of an adapter file that may bring new tokens along.

    Args:
        model: A fresh ``Diffusion``.
        path: The file.
        name: New name of the set, for files with one set.

    Raises:
        FileNotFoundError, ValueError: As ``visadapt.load``.
    """
    read(path)  # says what is wrong with the file, if anything is
    with safe_open(path, framework="pt") as file:
        tokens = [NewToken(**entry) for entry in json.loads((file.metadata() or {}).get(METADATA, "[]"))]
    if tokens and not extended(model):
        add_tokens(model, tokens)
    return load_native(model, path, name=name)


def export_tokens(model: Any, folder: str | Path) -> list[Path]:
    """Write each new token as an embedding file that stock tools load; none without new tokens.

    SD: one tensor (vectors, D) under the token's name, as ``pipeline.load_textual_inversion(file)`` reads it. SDXL:
    ``clip_l`` and ``clip_g``, to be loaded once for each encoder.
    """
    tables = extended(model)
    found, start = [], 0
    for token in getattr(model, "new_tokens", ()):
        rows = [t.new_tokens.detach()[start : start + token.vectors].cpu().contiguous().clone() for t in tables]
        start += token.vectors
        keys = ["clip_l", "clip_g"] if len(rows) > 1 else [token.name]
        path = Path(folder) / f"{re.sub(r'[^A-Za-z0-9_-]', '', token.name) or 'token'}.safetensors"
        with replacing(path) as temporary:
            temporary.write_bytes(serialise(dict(zip(keys, rows, strict=True)), {"format": "pt", "token": token.name}))
        found.append(path)
    return found


def bake_tokens(model: Any) -> None:
    """Make the extended tables ordinary ones, for ``save_pretrained`` of a merged pipeline."""
    for _, encoder in _encoders(model):
        table = encoder.get_input_embeddings()
        if isinstance(table, ExtendedEmbedding):
            rows = torch.cat([table.weight.detach()[: table.first], table.new_tokens.detach().to(table.weight.dtype)])
            _embeddings(encoder).token_embedding = nn.Embedding(rows.shape[0], rows.shape[1], _weight=rows)
            encoder.config.vocab_size = len(rows)
