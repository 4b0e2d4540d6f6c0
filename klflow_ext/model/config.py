"""The shape of a Denoiser."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

from klflow_ext.checks import check_choice, check_field, check_flag, check_int

Input = Literal["simplex", "posterior", "tokens"]
Time = Literal["token", "add", "adaln", "none"]
Preset = Literal["demo", "small", "150m", "1.5b"]


@dataclass(frozen=True)
class DenoiserConfig:
    """Shape of a Denoiser.

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    vocab_size: int
    """V, at least 2."""
    n_layer: int = 4
    """Blocks."""
    n_head: int = 4
    """Heads of the attention."""
    n_embd: int = 256
    """D, the width: a multiple of 2 n_head."""
    max_length: int = 256
    """Positions of the longest sequence."""
    input: Input = "posterior"
    """What a position feeds to the embedding matrix. "simplex": x_t itself, as the paper does. "posterior": the exact posterior
    of the token given its own noisy row and the unigram prior (ExactDenoiser for one position), in closed form. "tokens": an
    id in [0, V], V itself being a mask or a start; for paths of tokens."""
    top: int | None = 512
    """How many entries of the posterior are embedded exactly, the others as their mean (`ops.noise_embedding`); None: all. Below
    4 top tokens the dense product is as fast, and is used."""
    time: Time = "token"
    """How the network learns t (the paper's figure 5). "token": a position before all others. "add": added to the embedding of
    every position. "adaln": scales, shifts and gates every block (DiT, Peebles & Xie 2023). "none": not."""
    causal: bool = False
    """A position sees itself and those before it; needs time="none". Gives `Denoiser.cache`."""
    slices: bool = False
    """Trained on two streams, so that a text is written a slice of its positions at a time, each position computed once as a
    question and once as it stands (`Streams`). Needs time "none", "add" or "adaln", no causal and no self_conditioning. Gives
    `Denoiser.cache`."""
    self_conditioning: bool = False
    """`Denoiser.hidden` also reads its own previous result (Chen et al. 2023, "Analog Bits")."""

    PRESETS: ClassVar[dict[str, tuple[int, int, int, int]]] = {
        "demo": (4, 4, 256, 256),
        "small": (6, 6, 384, 256),
        "150m": (12, 12, 768, 1024),
        "1.5b": (48, 25, 1600, 1024),
    }

    MOST: ClassVar[dict[str, int]] = {  # what is asked for beyond is a mistake, or a file that lies
        "vocab_size": 2**31 - 1, "n_layer": 2**12, "n_head": 2**12, "n_embd": 2**18, "max_length": 2**20,
    }  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "max_length"):
            least, most = 2 if name == "vocab_size" else 1, self.MOST[name]
            check_int(name, getattr(self, name), least, most, f"an integer from {least} to {most}", ValueError)
        if self.top is not None:
            check_field("top", self.top, 1, "None or an integer >= 1")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd: got {self.n_embd}, allowed is a multiple of 2 n_head = {2 * self.n_head}")
        check_choice("input", self.input, get_args(Input))
        check_choice("time", self.time, get_args(Time))
        check_flag("causal", self.causal)
        check_flag("self_conditioning", self.self_conditioning)
        check_flag("slices", self.slices)
        if self.causal and self.time != "none":
            raise ValueError(f"time: got {self.time!r}, allowed is 'none' where causal is True")
        if self.slices and (self.causal or self.self_conditioning):
            raise ValueError("slices: got True, allowed is False where causal or self_conditioning is True")
        if self.slices and self.time == "token":
            raise ValueError("time: got 'token', allowed is 'none', 'add' or 'adaln' where slices is True")

    @classmethod
    def preset(cls, name: str, vocab_size: int, **overrides: Any) -> DenoiserConfig:
        """A known shape, in layers / heads / width / max_length; overrides are any fields of the config.

        "demo" 4 / 4 / 256 / 256, "small" 6 / 6 / 384 / 256, "150m" 12 / 12 / 768 / 1024 (GPT-2's: 85 M parameters in the
        blocks, 163 M in all at V = 50,258), "1.5b" 48 / 25 / 1600 / 1024 (GPT-2 XL's: 1.47 G in the blocks, 1.64 G in all).
        """
        if name not in cls.PRESETS:
            raise ValueError(f"name: got {name!r}, allowed is one of {sorted(cls.PRESETS)}")
        shape = dict(zip(("n_layer", "n_head", "n_embd", "max_length"), cls.PRESETS[name], strict=True))
        return cls(vocab_size, **{**shape, **overrides})

    def to_dict(self) -> dict:
        return asdict(self)
