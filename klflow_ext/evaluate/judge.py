"""Bits per byte of text under an independent model, which reads from left to right."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from klflow_ext.files import checksum, first_line
from klflow_ext.path import Autoregressive, as_network
from klflow_ext.path.network import Network
from klflow_ext.run import Run, is_saved_model, load_run

MOST_WORDS = 2**18  # whose pieces a judge keeps
POOLING = "bits of all texts over their UTF-8 bytes; each text from its first token on, by itself, cut at the context"


@contextmanager
def _reading(path: Path) -> Iterator[bytes]:
    if not path.is_file():
        raise ValueError(f"judge: {path.parent} has no {path.name}")
    try:
        yield path.read_bytes()
    except (ValueError, OSError, struct.error) as error:
        raise ValueError(f"judge: {path} cannot be read: {error}") from None


class Look(NamedTuple):
    """bits: -log2 p of a text. size: its UTF-8 bytes. feature: (D + 2,) float64, of its tokens the mean of the last hidden states (D,),
    and mean and standard deviation of -log p, by which a weak judge tells shuffled text too."""

    bits: float
    size: float
    feature: np.ndarray


class Scorer:
    """A model that says how likely each token of a text is after those before it.

    Attributes:
        kind: of the model, a word. folder: where it lies. context: how many tokens of a text it reads.
    """

    kind: ClassVar[str]
    folder: Path
    context: int

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, behind one that begins every text."""
        raise NotImplementedError

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(-log p in nats (L - 1,) of each of these tokens (L,) but the first, hidden states (L - 1, D) that say so)."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What stands beside its figures, in the types of JSON: the model, and how it reads."""
        return {
            "kind": self.kind, "folder": str(self.folder), "sha256": checksum(self._weights()), "context": self.context,
            "precision": str(self._precision()).removeprefix("torch."), "pooling": POOLING,
        }  # fmt: skip

    def _weights(self) -> Path:
        """The file that has them, or the first of several."""
        raise NotImplementedError

    def _precision(self) -> torch.dtype:
        return torch.float32

    @torch.no_grad()
    def look(self, texts: Sequence[str]) -> list[Look]:
        """What it makes of each text, cut at the context; of a text that is cut the bytes are counted in proportion."""
        found = []
        for text in texts:
            encoded = self.encode(text)
            tokens = torch.tensor(encoded[: self.context])
            nats, hidden = self.read(tokens)
            nats, hidden = nats.double(), hidden.double()
            if len(nats):
                feature = torch.cat([hidden.mean(0), torch.stack([nats.mean(), nats.std(correction=0)])])
            else:
                feature = torch.zeros(hidden.shape[1] + 2)
            size = len(text.encode(errors="surrogatepass")) * len(tokens) / len(encoded)
            found.append(Look(float(nats.sum()) / math.log(2), size, feature.double().cpu().numpy()))
        return found

    def bits(self, texts: Sequence[str]) -> list[tuple[float, float]]:
        """(-log2 p, UTF-8 bytes) of each text."""
        return [(one.bits, one.size) for one in self.look(texts)]

    def bits_per_byte(self, texts: Sequence[str]) -> float:
        """The bits of all texts over their bytes."""
        bits, sizes = zip(*self.bits(texts), strict=True)
        return sum(bits) / sum(sizes)

    def features(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D + 2) float64: the feature of each text."""
        return np.stack([one.feature for one in self.look(texts)])


class Judge(Scorer):
    """A small pretrained Llama in llama2.c's legacy format, such as stories260K.

    Args: folder with stories260K.bin and tok512.bin.
    Raises:
        ValueError: one is missing or cannot be read; the message names it.
    """

    kind = "llama2.c"

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        with _reading(self._weights()) as raw:
            self._read_weights(raw)
        with _reading(self.folder / "tok512.bin") as raw:
            self._read_pieces(raw, len(self.classifier))

    def _weights(self) -> Path:
        return self.folder / "stories260K.bin"

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
        self.by_words = not any(b" " in piece[1:] for piece in self.pieces)
        self.words: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """SentencePiece-style merges by score, bytes where a character has no piece; starts with BOS = 1.

        Words are merged by themselves, each once, where no piece reaches over a space.
        """
        parts = re.findall(r" [^ ]*", " " + text) if self.by_words else [" " + text]
        if len(self.words) > MOST_WORDS:
            self.words.clear()
        for part in {*parts} - self.words.keys():
            self.words[part] = self._merged(part)
        return [1, *(token for part in parts for token in self.words[part])]

    def _merged(self, text: str) -> list[int]:
        tokens = []
        for character in text:
            piece = self.pieces.get(character.encode())
            tokens += [piece] if piece is not None else [byte + 3 for byte in character.encode()]
        while True:
            best = None
            for i in range(len(tokens) - 1):
                merged = self.pieces.get(self.names.get(tokens[i], b"\0") + self.names.get(tokens[i + 1], b"\0"))
                if merged is not None and (best is None or self.scores[merged] > best[0]):
                    best = (self.scores[merged], i, merged)
            if best is None:
                return tokens
            tokens[best[1] : best[1] + 2] = [best[2]]

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens, label = tokens[:-1], tokens[1:]
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
        x = norm(x, self.norm_final)
        return F.cross_entropy(x @ self.classifier.T, label, reduction="none"), x


class RunJudge(Scorer):
    """An Autoregressive run of this package, or such a model saved by `klflow_ext.hub`.

    Raises:
        ValueError: the folder holds no such model, one without a tokenizer, or one of which only the call is known.
    """

    kind = "klflow_ext"

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        self.folder = Path(folder)
        model, self.path, self.tokenizer = load_run(folder)
        network = as_network(model, self.path)
        if not isinstance(self.path, Autoregressive) or not isinstance(network, Network) or self.tokenizer is None:
            raise ValueError(
                f"judge: got {folder} with {self.path!r}, allowed is an Autoregressive path with a Network and a tokenizer"
            )
        self.network = network.to(device)
        trained = None if is_saved_model(self.folder) else Run(folder).config()["train"]["length"]
        self.context = (trained or network.max_length or 1024) + 1  # the start token too

    def encode(self, text: str) -> list[int]:
        return [self.path.vocab_size, *self.tokenizer.encode(text, add_special_tokens=False).ids]

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        label = tokens[None, 1:].to(self._device())
        if not label.numel():
            return torch.zeros(0), torch.zeros(0, self.network.head.weight.shape[1])
        times = torch.zeros(1, device=label.device)
        prediction = self.network.predict(self.path.noisy(label, times, 0), times)
        assert prediction.hidden is not None
        return prediction.cross_entropy(label, reduction="none")[0], prediction.hidden[0]

    def _device(self) -> torch.device:
        return self.network.head.weight.device

    def _precision(self) -> torch.dtype:
        return self.network.head.weight.dtype

    def _weights(self) -> Path:
        return (self.folder if is_saved_model(self.folder) else Run(self.folder).last().folder) / "model.safetensors"


class TransformersJudge(Scorer):
    """A causal model of `transformers` with its tokenizer, of a local folder; nothing is downloaded.

    Raises:
        ValueError: the folder holds no such model, or its tokenizer has no token to begin a text with (BOS, else EOS).
        ImportError: transformers is not here.
    """

    kind = "transformers"

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise ImportError("this judge needs the hf extra: pip install 'klflow_ext[hf]'") from None
        self.folder = Path(folder)
        try:
            self.model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).to(device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (ValueError, OSError, KeyError, RuntimeError) as error:
            said = first_line(error)
            raise ValueError(f"judge: {folder} cannot be read as a causal model of transformers: {said}") from None
        start = self.tokenizer.bos_token_id
        self.start = self.tokenizer.eos_token_id if start is None else start
        if self.start is None:
            raise ValueError(f"judge: got {folder} with a tokenizer without BOS and EOS, allowed is one with either")
        self.context = (
            self.model.config.to_dict().get("max_position_embeddings")
            or self.model.config.to_dict().get("n_positions")
            or 1024
        )

    def encode(self, text: str) -> list[int]:
        return [self.start, *self.tokenizer.encode(text, add_special_tokens=False)]

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = tokens.to(self.model.device)
        found = self.model(tokens[None], output_hidden_states=True)
        nats = F.cross_entropy(found.logits[0, :-1].float(), tokens[1:], reduction="none")
        return nats, found.hidden_states[-1][0, :-1]

    def _precision(self) -> torch.dtype:
        return self.model.dtype

    def _weights(self) -> Path:
        return min(f for kind in ("*.safetensors", "*.bin") for f in self.folder.glob(kind))


def open_judge(folder: str | Path, device: str | torch.device = "cpu") -> Scorer:
    """The judge that a folder holds: stories260K, an Autoregressive run or saved model of this package, or a causal model of
    `transformers`.

    Raises:
        ValueError: it holds none of these, or what it holds cannot be read.
    """
    folder = Path(folder)
    if (folder / "stories260K.bin").is_file():
        return Judge(folder)
    if is_saved_model(folder) or Run(folder).checkpoints():
        return RunJudge(folder, device)
    if (folder / "config.json").is_file():
        return TransformersJudge(folder, device)
    raise ValueError(f"judge: {folder} has no stories260K.bin, no run of this package and no model of transformers")
