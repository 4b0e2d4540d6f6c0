"""Bits per byte of text under an independent model."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


@contextmanager
def _reading(path: Path) -> Iterator[bytes]:
    if not path.is_file():
        raise ValueError(f"judge: {path.parent} has no {path.name}")
    try:
        yield path.read_bytes()
    except (ValueError, OSError, struct.error) as error:
        raise ValueError(f"judge: {path} cannot be read: {error}") from None


class Judge:
    """A small pretrained Llama in llama2.c's legacy format, which scores text in bits per byte.

    Args: folder with stories260K.bin and tok512.bin.
    Raises:
        ValueError: one is missing or cannot be read; the message names it.
    """

    def __init__(self, folder: str | Path):
        with _reading(Path(folder) / "stories260K.bin") as raw:
            self._read_weights(raw)
        with _reading(Path(folder) / "tok512.bin") as raw:
            self._read_pieces(raw, len(self.classifier))

    def _read_weights(self, raw: bytes) -> None:
        dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", raw)
        shared, vocab = vocab > 0, abs(vocab)
        if min(dim, hidden, layers, heads, kv_heads, vocab, context) < 1 or dim % (2 * heads) or heads % kv_heads:
            raise ValueError("its sizes are none of a model")
        values, at = np.frombuffer(raw, np.dtype("<f4"), offset=28), 0

        def take(*shape):
            nonlocal at
            size = math.prod(shape)
            at += size
            if at > len(values):
                raise ValueError("it ends too early")
            return torch.from_numpy(values[at - size : at].reshape(shape).copy())

        kv = dim // heads * kv_heads
        self.embedding = take(vocab, dim)
        self.norm_attention = take(layers, dim)
        self.wq, self.wk, self.wv = take(layers, dim, dim), take(layers, kv, dim), take(layers, kv, dim)
        self.wo, self.norm_mlp = take(layers, dim, dim), take(layers, dim)
        self.w1, self.w2, self.w3 = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
        self.norm_final = take(dim)
        take(2, context, dim // heads // 2)  # stored rotations, recomputed below
        self.classifier = self.embedding if shared else take(vocab, dim)
        self.layers, self.heads, self.kv_heads, self.context = layers, heads, kv_heads, context

        if at != len(values) or not np.isfinite(values).all():
            raise ValueError("it holds more than a model" if at < len(values) else "its weights are not finite")

    def _read_pieces(self, raw: bytes, vocab: int) -> None:
        at = 4
        self.pieces: dict[bytes, int] = {}
        self.scores: list[float] = []
        for token in range(vocab):
            score, size = struct.unpack_from("<fi", raw, at)
            if not 0 <= size <= len(raw) - at - 8:
                raise ValueError(f"its piece {token} has {size} bytes")
            self.pieces.setdefault(raw[at + 8 : at + 8 + size], token)
            self.scores.append(score)
            at += 8 + size
        self.names = {token: piece for piece, token in self.pieces.items()}

    def encode(self, text: str) -> list[int]:
        """SentencePiece-style merges by score, bytes where a character has no piece; starts with BOS = 1."""
        tokens = []
        for character in " " + text:
            piece = self.pieces.get(character.encode())
            tokens += [piece] if piece is not None else [byte + 3 for byte in character.encode()]
        while True:
            best = None
            for i in range(len(tokens) - 1):
                merged = self.pieces.get(self.names.get(tokens[i], b"\0") + self.names.get(tokens[i + 1], b"\0"))
                if merged is not None and (best is None or self.scores[merged] > best[0]):
                    best = (self.scores[merged], i, merged)
            if best is None:
                return [1, *tokens]
            tokens[best[1] : best[1] + 2] = [best[2]]

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        length, size = len(tokens), self.embedding.shape[1] // self.heads
        angles = torch.outer(
            torch.arange(length, dtype=torch.float32),
            10000.0 ** -(torch.arange(0, size, 2, dtype=torch.float32) / size),
        )
        rotation = torch.polar(torch.ones_like(angles), angles)[:, None]

        def rotate(x):
            pairs = torch.view_as_complex(x.reshape(length, -1, size // 2, 2).contiguous())
            return torch.view_as_real(pairs * rotation).reshape(length, -1, size)

        x = self.embedding[tokens]
        norm = lambda x, w: F.rms_norm(x, (x.shape[-1],), w, 1e-5)  # noqa: E731
        for i in range(self.layers):
            h = norm(x, self.norm_attention[i])
            q, k = rotate(h @ self.wq[i].T), rotate(h @ self.wk[i].T)
            v = (h @ self.wv[i].T).reshape(length, self.kv_heads, size)
            k, v = (z.repeat_interleave(self.heads // self.kv_heads, 1) for z in (k, v))
            q, k, v = (z.transpose(0, 1)[None] for z in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + y[0].transpose(0, 1).reshape(length, -1) @ self.wo[i].T
            h = norm(x, self.norm_mlp[i])
            x = x + (F.silu(h @ self.w1[i].T) * (h @ self.w3[i].T)) @ self.w2[i].T
        return norm(x, self.norm_final) @ self.classifier.T

    @torch.no_grad()
    def bits(self, texts) -> list[tuple[float, float]]:
        """(-log2 p, UTF-8 bytes) of each text, cut at the judge's context; of a text that is cut the bytes in proportion."""
        found = []
        for text in texts:
            encoded = self.encode(text)
            tokens = torch.tensor(encoded[: self.context])
            loss = F.cross_entropy(self.logits(tokens[:-1]), tokens[1:], reduction="sum").item()
            found.append((loss / math.log(2), len(text.encode()) * len(tokens) / len(encoded)))
        return found

    def bits_per_byte(self, texts) -> float:
        """The bits of all texts over their bytes."""
        bits, sizes = zip(*self.bits(texts), strict=True)
        return sum(bits) / sum(sizes)
