"""Pretrained transformers as denoisers: their embedding matrix, encoder or decoder, and output layer, by `inputs_embeds`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as Folder
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klflow_ext.data import vocab_size_of
from klflow_ext.files import first_line
from klflow_ext.hub import from_pretrained, push_to_hub, save_pretrained
from klflow_ext.model import Reader
from klflow_ext.model.config import Input
from klflow_ext.path import LogitPath, Path

try:
    import transformers
except ImportError as error:
    raise ImportError('transformers is missing: pip install "klflow_ext[hf]"') from error


class TransformerDenoiser(Reader):
    """A masked or causal language model of `transformers` as a Network: BERT, ModernBERT, GPT-2, Llama, Qwen and their kin.

        model = TransformerDenoiser.of(name)  # or TransformerDenoiser(AutoModelForMaskedLM.from_pretrained(name), tokenizer=...)
        Trainer(model, model.path, tokens, TrainConfig(lr=1e-4, length=128)).fit()
        Sampler(model, model.path).sample((4, 128))

    Embedding matrix and output layer (its bias, tied weights, a padded vocabulary, a softcap) stay what they are, and rows that show
    their tokens are read as those tokens: there the logits are the transformer's own. A noisy row is read as the mean embedding of
    its posterior ("posterior"), or as its product with the matrix, brought to the size of an embedding ("simplex"). Neither rows
    of V nor logits of a whole batch are built.

    The time is not told: a posterior says how sure it is. `hidden` is all but the output layer, BERT's prediction-head transform
    with it. On a path of tokens there is a row more, for the mask or start, at first the mean embedding, or that of the tokenizer's
    mask; the matrix is then copied in each pass.

    Args:
        transformer: taken over, and changed: its output layer moves to `head`.
        path: from noise to text; None: a LogitPath of the tokenizer's V, or of the transformer's.
        tokenizer: a fast one of transformers, or a tokenizers.Tokenizer; None: none is kept.
        causal: False: a decoder's causal mask is taken off. True: it is kept; needs a decoder. Either way a position is trained to
            say its own token, where a decoder was trained to say the next.
        input, top, log_prior: as in `Reader`.
        check: whether a few tokens are read, to see that this network says what the transformer said, and whom a position sees.

    Raises:
        ValueError, TypeError: a transformer that has no output layer, takes no inputs_embeds, is an encoder-decoder, or says
            something else than its output layer of its last hidden states; a vocabulary that does not fit. The message names it.
    """

    def __init__(
        self, transformer: Any, path: Path | None = None, tokenizer: Any = None, *, causal: bool = False,
        input: Input | None = None, top: int | None = 512, log_prior: Tensor | None = None, check: bool = True,
    ):  # fmt: skip
        output, embedding = _check_parts(transformer)
        backend = _backend(tokenizer)
        if path is None:
            path = LogitPath(embedding.num_embeddings if backend is None else vocab_size_of(backend))
        vocab = path.vocab_size
        for name, rows in (("embedding", embedding.num_embeddings), ("head", output.weight.shape[0])):
            if rows < vocab:
                raise ValueError(f"{name}: got {rows} tokens, allowed are at least those of the path, V = {vocab}")
        if backend is not None and vocab_size_of(backend) > vocab:
            raise ValueError(
                f"tokenizer: got one of {vocab_size_of(backend)} tokens, allowed are at most V = {vocab} of the path"
            )
        super().__init__(path, input, top, log_prior)
        self.tokenizer, self.causal, self.vocab_size = backend, causal, vocab
        self.max_length, self._recompute = _longest(transformer), False
        own = _own_logits(transformer, vocab) if check else None
        self.transformer, self.head = transformer, output
        where = next(name for name, part in transformer.named_modules() if part is output)
        transformer.set_submodule(where, nn.Identity())  # then its logits are what the output layer reads
        config = transformer.config
        kept = {name: getattr(config, name, None) for name in ("use_cache", "final_logit_softcapping", "is_causal")}
        try:
            self.softcap = kept["final_logit_softcapping"]
            if self.softcap is not None:
                config.final_logit_softcapping = None
            config.use_cache = False
            if self.input == "tokens":
                row = embedding.weight.detach()[:vocab].mean(0)
                mask = None if backend is None else backend.token_to_id("[MASK]")
                self.extra = nn.Parameter(row if mask is None else embedding.weight.detach()[mask].clone())
            if own is not None:
                self._check_logits(own)
            if not causal:
                _see_all(transformer)
            if own is not None:
                self._check_sight()
        except BaseException:
            for name, value in kept.items():
                if value is not None:
                    setattr(config, name, value)
            transformer.set_submodule(where, output)
            raise

    @classmethod
    def of(
        cls, name: str | Folder, *, causal: bool = False, beta: float = 0.01, t_max: float | None = None, **options: Any
    ) -> TransformerDenoiser:
        """That of a model of `transformers` by its folder, or by its name, of which the Hub's cache has the files: nothing is
        downloaded. Its tokenizer comes with it.

        Args:
            name: as its `from_pretrained` takes it.
            beta, t_max: of its LogitPath.
            causal, options: as those of a TransformerDenoiser.

        Raises:
            ValueError, TypeError: it cannot be read, or be adapted; the message names it.
        """
        what: dict[str, Any] = {"pretrained_model_name_or_path": str(name), "local_files_only": True}
        what["trust_remote_code"] = False
        try:
            config = transformers.AutoConfig.from_pretrained(**what)
            tokenizer = transformers.AutoTokenizer.from_pretrained(**what)
            decoder = any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in config.architectures or ())
            kind = transformers.AutoModelForCausalLM if decoder else transformers.AutoModelForMaskedLM
            transformer = kind.from_pretrained(**what, dtype=torch.float32)
        except (OSError, ValueError, KeyError, ImportError) as error:
            said = first_line(error)
            raise ValueError(
                f"transformer: {name} cannot be read ({said}), allowed is the folder of a masked or causal language model, or its "
                "name, once `hf download` has fetched it"
            ) from error
        path = LogitPath(vocab_size_of(_backend(tokenizer)), beta, t_max)
        model = cls(transformer, path, tokenizer, causal=causal, **options)
        model.tokenizer.no_truncation()  # either would change what is trained on
        model.tokenizer.no_padding()
        return model

    # ---- the protocol

    @property
    def table(self) -> Tensor:
        weight = self.transformer.get_input_embeddings().weight[: self.path.vocab_size]
        return torch.cat([weight, self.extra[None].to(weight.dtype)]) if self.input == "tokens" else weight

    def scaled_rows(self, h: Tensor, certain: Tensor) -> Tensor:
        """What stands out of the mean embedding, brought to the size at which the embeddings do; certain rows as they are."""
        table = self.table.detach().float()
        mean = table.mean(0)
        apart = h.float() - mean
        size = (table - mean).square().mean().sqrt()
        apart = apart * (size / apart.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-20))
        return torch.where(certain[..., None], h, (mean + apart).to(h.dtype))

    def hidden(self, h: Tensor, t: Tensor | float) -> Tensor:
        """Embeddings h (B, L, D) to what the output layer reads; t is not read."""
        if self.max_length is not None and h.shape[1] > self.max_length:
            raise ValueError(f"h: got a length of {h.shape[1]}, allowed is at most max_length = {self.max_length}")
        return self.transformer(inputs_embeds=h).logits

    def sharded_units(self) -> list[nn.Module]:
        """Its layers."""
        names = self.transformer._no_split_modules or ()
        return [part for part in self.transformer.modules() if type(part).__name__ in names]

    @property
    def recompute(self) -> bool | None:  # type: ignore[override]
        """Gradient checkpointing, of transformers."""
        return self._recompute if self.transformer.supports_gradient_checkpointing else None

    @recompute.setter
    def recompute(self, on: bool | None) -> None:
        if on:
            self.transformer.activation_checkpointing_enable({"use_reentrant": False})
        elif self._recompute:
            self.transformer.activation_checkpointing_disable()
        self._recompute = bool(on)

    # ---- files

    def to_dict(self) -> dict[str, Any]:
        """The transformer's class and config, and how it is used."""
        config = json.loads(self.transformer.config.to_json_string(use_diff=False))
        config["final_logit_softcapping"] = self.softcap
        return {
            "architecture": type(self.transformer).__name__, "config": config, "dtype": str(self.head.weight.dtype)[6:],
            "causal": self.causal, "input": self.input, "top": self.top,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any], path: Path) -> TransformerDenoiser:
        values = dict(values)
        name, config, dtype = (values.pop(key) for key in ("architecture", "config", "dtype"))
        kind = getattr(transformers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise ValueError(
                f"architecture: got {name!r}, allowed is a class of transformers {transformers.__version__}"
            )
        config = {key: value for key, value in config.items() if value is not None or key != "final_logit_softcapping"}
        made = kind(transformers.AutoConfig.for_model(config.pop("model_type"), **config))
        return cls(made.to(getattr(torch, dtype)), path, **values)

    def save_pretrained(self, folder: str | Folder, *, data: str | None = None, name: str | None = None) -> None:
        """Model, tokenizer and a model card, as `klflow_ext.hub.save_pretrained`."""
        save_pretrained(folder, self, self.path, self.tokenizer, data=data, base=self._base(), name=name)

    def push_to_hub(self, repo_id: str, *, data: str | None = None, **options: Any) -> Any:
        """As `klflow_ext.hub.push_to_hub`."""
        return push_to_hub(repo_id, self, self.path, self.tokenizer, data=data, base=self._base(), **options)

    @classmethod
    def from_pretrained(cls, name: str | Folder, **options: Any) -> TransformerDenoiser:
        """That of a folder, a run folder or a repository, with its `path` and `tokenizer`; options as in
        `klflow_ext.hub.from_pretrained`."""
        model, _, tokenizer = from_pretrained(name, **options)
        if not isinstance(model, cls):
            raise ValueError(f"name: got {str(name)!r} with a {type(model).__name__}, allowed is a {cls.__name__}")
        model.tokenizer = tokenizer
        return model

    def _base(self) -> str | None:
        name = str(self.transformer.config._name_or_path or "")
        return name if name and not Folder(name).exists() and not name.startswith(("/", ".")) else None

    # ---- whether all this is so

    @torch.no_grad()
    def _check_logits(self, own: Tensor) -> None:
        tokens = _probe(self.path.vocab_size, own.device, self.transformer.config)
        with _evaluating(self.transformer):
            h = F.embedding(tokens, self.transformer.get_input_embeddings().weight)
            try:
                hidden = self.transformer(inputs_embeds=h).logits
            except Exception as error:  # whatever its forward does with the layer
                name, said = type(self.transformer).__name__, first_line(error)
                raise ValueError(
                    f"transformer: got a {name}, which does not run without its output layer ({said}), allowed is one that does"
                ) from error
            ours = self.head(hidden)[..., : self.path.vocab_size].float()
        if self.softcap is not None:
            ours = self.softcap * torch.tanh(ours / self.softcap)
        off = float((ours - own).abs().max() / own.abs().max().clamp_min(1e-6))
        if not off < (1e-3 if self.head.weight.dtype == torch.float32 else 5e-2):
            raise ValueError(
                f"transformer: got a {type(self.transformer).__name__} whose logits are off by {off:.2g} of their size where it "
                "reads inputs_embeds, allowed is one that reads rows of its embedding matrix, and whose logits are its output "
                "layer of its last hidden states"
            )

    @torch.enable_grad()
    def _check_sight(self) -> None:
        """By the gradient: whether the first position sees the last."""
        h = torch.randn(1, 4, self.table.shape[1], generator=torch.Generator().manual_seed(0))
        h = h.to(self.table.device, self.table.dtype).requires_grad_()
        with _evaluating(self.transformer):
            first = self.transformer(inputs_embeds=h).logits[0, 0].float()
            weights = torch.linspace(-1, 1, len(first), device=first.device)  # a plain sum of normed ones is constant
            seen = torch.autograd.grad((first * weights).sum(), h)[0][0, -1]
        sees = bool((seen != 0).any())
        if sees == self.causal:
            can = (
                "True: its first position does not see the last"
                if self.causal is False
                else "False: it has no causal mask"
            )
            raise ValueError(f"causal: got {self.causal}, allowed for {type(self.transformer).__name__} is {can}")


def _check_parts(transformer: Any) -> tuple[nn.Linear, nn.Embedding]:
    """(output layer, embedding) of a transformer that can be adapted."""
    if not isinstance(transformer, transformers.PreTrainedModel):
        raise TypeError(f"transformer: got {type(transformer).__name__}, allowed is a model of transformers")
    name = type(transformer).__name__
    if transformer.config.is_encoder_decoder:
        raise ValueError(f"transformer: got {name}, an encoder-decoder, allowed is an encoder or a decoder")
    if "inputs_embeds" not in inspect.signature(transformer.forward).parameters:
        raise ValueError(f"transformer: got {name}, which takes no inputs_embeds, allowed is one that does")
    output, embedding = transformer.get_output_embeddings(), transformer.get_input_embeddings()
    if not isinstance(output, nn.Linear):
        got = "no output layer" if output is None else f"a {type(output).__name__} as its output layer"
        raise ValueError(
            f"transformer: got {name} with {got}, allowed is one with a torch.nn.Linear, as AutoModelForMaskedLM and "
            "AutoModelForCausalLM give it"
        )
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(f"transformer: got {name} with a {type(embedding).__name__}, allowed is a torch.nn.Embedding")
    return output, embedding


def _backend(tokenizer: Any) -> Any:
    """The tokenizers.Tokenizer of a tokenizer."""
    if tokenizer is None:
        return None
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, Tokenizer):
        raise TypeError(f"tokenizer: got {type(tokenizer).__name__}, allowed is a fast one, or a tokenizers.Tokenizer")
    return backend


def _longest(transformer: Any) -> int | None:
    """The longest sequence that it reads. Positions of RoBERTa and its kin begin behind that of padding."""
    longest = getattr(transformer.config, "max_position_embeddings", None)
    for part in transformer.modules():
        if isinstance(part, nn.Embedding) and part.num_embeddings == longest and part.padding_idx is not None:
            if part is not transformer.get_input_embeddings():
                return longest - part.padding_idx - 1
    return longest


def _see_all(transformer: Any) -> None:
    """Takes the causal mask off: by the config where masks are made, by the layers where the attention's kernel makes its own."""
    transformer.config.is_causal = False
    for part in transformer.modules():
        if isinstance(getattr(part, "is_causal", None), bool):
            part.is_causal = False


def _probe(vocab: int, device: torch.device, config: Any) -> Tensor:
    """(2, 1) ids, none of them padding."""
    ids = [i for i in (vocab - 1, vocab // 2, 1, 0) if i != getattr(config, "pad_token_id", None)][:2]
    return torch.tensor(ids, device=device)[:, None]


@torch.no_grad()
def _own_logits(transformer: Any, vocab: int) -> Tensor | None:
    """(2, 1, V) of the probe; None where there are no weights."""
    device = next(transformer.parameters()).device
    if device.type == "meta":
        return None
    with _evaluating(transformer):
        return transformer(input_ids=_probe(vocab, device, transformer.config)).logits[..., :vocab].float()


@contextmanager
def _evaluating(transformer: Any) -> Iterator[None]:
    training = transformer.training
    transformer.eval()
    try:
        yield
    finally:
        transformer.train(training)
