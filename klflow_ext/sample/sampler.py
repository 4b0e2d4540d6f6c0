"""The Sampler: checks what it is asked for, and hands sequences of one length to a way through them."""

from __future__ import annotations

import reprlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from klflow_ext.checks import LEAST, MOST, check_device, check_int, check_scalar
from klflow_ext.ops.arguments import DEBUG_CHECK
from klflow_ext.path import Autoregressive, Evidence, Likelihood, Path, ResolvedOptions, SampleOptions, as_network
from klflow_ext.path.base import check_text
from klflow_ext.path.network import Model, Network, evaluating
from klflow_ext.sample.passes import Passes
from klflow_ext.sample.replay import Replays
from klflow_ext.sample.samples import Samples, encoded, is_rows, is_texts, prompted, seeds_of, token_ids, with_holes
from klflow_ext.sample.scoring import Scoring
from klflow_ext.sample.watching import Pass, Watcher
from klflow_ext.sample.ways import Way, hearing_names, hears, is_ordered, ordered_names, wants_same_free, way_of


@dataclass(frozen=True)
class _Request:
    options: ResolvedOptions
    progress: bool
    return_history: bool
    watch: Callable[[Pass], object] | None = None
    top: int = 0


class Sampler:
    """Generates tokens with a model of a path: `model(x_t, t) -> logits`, x_t as `path.reads` says, logits (B, L, V).

    Of a Network (Denoiser) logits are never built whole, and of one that makes noise re-noised rows neither. The model is
    in evaluation mode while it samples. With an Autoregressive path, generation goes from left to right: `steps`, `method`, `t_split`,
    `grid_power` and `euler` do not apply, and nfe is the number of positions decoded. A position that is given after one
    that is free keeps its token, but the tokens before it are drawn without seeing it.

    cuda_graph: the kernels are recorded as a CUDA graph and replayed from then on: the same tokens, at the speed of the kernels
    where Python would be slower. Of method="sampling" a pass and its draw are recorded, once for each (B, L), top_k, top_p,
    temperature (also each of a schedule) and autocast. Of "slices" all passes are, once for each of these, the number of given
    positions and of slices. Only for a Denoiser on a LogitPath with alpha = 1, on CUDA, without history, watch and evidence.
    Weights may be trained or loaded between calls; the recordings live as long as the Sampler.

    tokenizer: a tokenizers.Tokenizer, by which prompts and texts with holes may be strings, and samples have `texts`.

    Raises:
        ValueError: a model whose head is not V wide, or that is not causal on an Autoregressive path; a device for which there are
            no kernels; or cuda_graph where it cannot be.
        TypeError: a path or a model that is none.
    """

    def __init__(
        self,
        model: Model,
        path: Path,
        device: str | torch.device = "cpu",
        cuda_graph: bool = False,
        tokenizer: Any = None,
    ):
        self.network = as_network(model, path)
        self.model, self.path, self.device = model, path, torch.device(device)
        self.tokenizer = tokenizer
        if isinstance(path, Autoregressive) and self.network.causal is False:
            raise ValueError("model: got one whose config.causal is False, allowed is a causal one on this path")
        self._replays: Replays | None = None
        network = self._recordable() if cuda_graph else None
        check_device(self.device)
        if network is not None:
            self._replays = Replays(network, path, self.device)

    @property
    def default_method(self) -> str:
        """ "slices" for a network that was trained with them, else "segments"."""
        return "slices" if self.network.slices else "segments"

    def _recordable(self) -> Network:
        """The network, if its steps can be recorded."""
        network = self.network
        if not self.path.closed_form or not network.makes_noise or not isinstance(network, Network):
            got, allowed = f"a {type(self.model).__name__} on {self.path!r}", "a Denoiser on a LogitPath with alpha = 1"
        elif self.device.type != "cuda":
            got, allowed = f"device {self.device}", "a CUDA device"
        elif DEBUG_CHECK:
            got, allowed = "KLFLOW_CHECK=1, whose checks synchronise", "0"
        else:
            return network
        raise ValueError(f"cuda_graph: got True with {got}, allowed with it is {allowed}")

    def sample(self, shape: tuple[int, int], options: SampleOptions | None = None, **more: Any) -> Samples:
        """(B, L) sequences from nothing; the others as in `infill`."""
        tokens = torch.zeros(shape, dtype=torch.int64, device=self.device)
        return self.infill(tokens, torch.zeros(shape, dtype=torch.bool, device=self.device), options, **more)

    def complete(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int] | Tensor],
        length: int | None = None,
        options: SampleOptions | None = None,
        *,
        new_tokens: int | None = None,
        **more: Any,
    ) -> Samples:
        """Continues prompts of any lengths, none at all too; the others as in `infill`.

        Args:
            prompts: token ids, or strings where the Sampler has a tokenizer. A space at the end of a string is left to the token that
                follows, where the tokenizer joins it to a word; `Samples.texts` hold it in any case.
            length: of each sequence, its prompt included: tokens (B, length) come back.
            new_tokens: in place of length, how many follow each prompt: a list comes back. None beside no length: 64, or as many
                as the model's max_length leaves.
        """
        spaces: list[list[int]] = []
        if is_texts(prompts):
            prompts, spaces = encoded(self.tokenizer, prompts)
        if not is_rows(prompts):
            raise TypeError(
                f"prompts: got {reprlib.repr(prompts)}, allowed is a list of strings or of token ids such as [[5, 6, 7]]"
            )
        rows = [token_ids(f"prompts: number {i}", prompt) for i, prompt in enumerate(prompts)]
        if length is not None:
            length = check_int("length", length, 0, 2**31, "an integer in [0, 2^31]")
            self._check_length("length", length)
        tokens, given = prompted(rows, length, new_tokens, self.network.max_length)
        if length is None:
            found = self.infill(tokens, given, options, **more)
        else:
            both = [torch.stack(x) if x else torch.zeros(0, length) for x in (tokens, given)]
            found = self.infill(both[0].to(self.device).long(), both[1].to(self.device).bool(), options, **more)
        found.spaces = spaces
        return found

    @torch.no_grad()
    def infill(
        self,
        tokens: Tensor | Sequence[Sequence[int] | Tensor] | Sequence[str],
        given: Tensor | Sequence[Sequence[bool] | Tensor] | None = None,
        options: SampleOptions | None = None,
        *,
        seed: int | Sequence[int] = 0,
        evidence: Evidence | Sequence[Evidence] | None = None,
        progress: bool = False,
        return_history: bool = False,
        watch: Callable[[Pass], object] | None = None,
        top: int = 0,
        **changes: Any,
    ) -> Samples:
        """Fills the positions that are not given; given tokens come back as they went in.

        Args:
            tokens: (B, L) ids; values where given is False are ignored. Or a list of sequences of any lengths: those of one
                length are run together, so that none sees padding, and come back in a list. Or a list of strings with holes,
                {?n} of n tokens each, where the Sampler has a tokenizer; a space before a hole as in `complete`.
            given: (B, L) bool, or a list as long, of each sequence's flags; none beside strings.
            options: how; None: `SampleOptions()`. changes: fields of it that differ, such as steps=16.
            seed: one seed, or one for each sequence: the same seed gives the same tokens in any batch.
            evidence: what was observed of the positions that are not given, for confidence, slices and segments; of a list of
                sequences a list, of one sequence each. A network that reads posteriors hears it: it is a part of what every
                position reads. For others the likelihood is a factor of what is drawn from.
            progress: shows a line with the time left.
            return_history: keeps the tokens after each pass.
            watch: called after each pass with what it leaves behind, a `Pass`; `passes.append` keeps all. The tokens are the same
                with and without it.
            top: how many of the likeliest tokens of each position a Pass holds, in [0, V].

        Raises:
            ValueError: an argument is outside its range or of a wrong shape, or not for a Sampler with cuda_graph; the
                message names it.
            TypeError: an argument is of a wrong type, or no field of the options.
        """
        spaces: list[list[int]] = []
        if is_texts(tokens) and given is None:
            tokens, given, spaces = with_holes(self.tokenizer, tokens)
        elif not isinstance(tokens, Tensor) and not is_texts(tokens) and not is_rows(tokens):
            raise TypeError(
                f"tokens: got {reprlib.repr(tokens)}, allowed is a list of strings or, with `given`, of token ids such as [[5, 6, 7]]"
            )
        elif is_texts(tokens) or given is None:
            raise TypeError(
                f"given: got {type(given).__name__} beside tokens of {type(tokens).__name__}, allowed are tokens with their flags, "
                "or a list of strings alone"
            )
        top = check_int("top", top, 0, self.path.vocab_size, f"an integer in [0, V = {self.path.vocab_size}]")
        request = _Request(self._options(options, changes), progress, return_history, watch, top)
        way = way_of(self.path, request.options.method)
        if self._replays is not None:
            looks = return_history or watch is not None
            if request.options.method not in ("sampling", "slices") or looks or evidence is not None:
                raise ValueError(
                    f"cuda_graph: got True with method={request.options.method!r}, a look at each pass: {looks}, evidence: "
                    f"{evidence is not None}, allowed with it are 'sampling' or 'slices', False and False"
                )
        if evidence is not None and not hears(way):
            raise ValueError(
                f"method: got {request.options.method!r} with evidence, allowed with it is one of {hearing_names()}"
            )
        found = self._filled(tokens, given, seed, way, request, evidence)
        found.spaces = spaces
        return found

    def _filled(self, tokens, given, seed, way: Way, request: _Request, evidence) -> Samples:
        """What `infill` gives of token ids."""
        if not isinstance(tokens, Tensor):
            return self._infill_ragged(
                tokens, given, seeds_of(seed, len(tokens)), way, request, self._each(evidence, tokens)
            )
        tokens, given = self._checked(tokens, given)
        observed = self._check_evidence(evidence, tokens)
        seeds = seeds_of(seed, len(tokens))
        if not wants_same_free(way) or bool(((~given).sum(1) == (~given[:1]).sum(1)).all()):
            return self._infill(tokens, given, seeds, way, request, observed)
        each = None if observed is None else [observed[i : i + 1] for i in range(len(tokens))]
        found = self._infill_ragged(tokens.cpu(), given.cpu(), seeds, way, request, each)
        found.tokens, found.given = (torch.stack(list(rows)) for rows in (found.tokens, found.given))
        found.history = [torch.stack(list(rows)) for rows in found.history]
        return found

    @torch.no_grad()
    def posterior(
        self, tokens: Tensor, given: Tensor, *, evidence: Evidence | None = None, top: int = 8, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """What the network says of each free position by itself, in one pass, given what stands and what was observed.

        Args:
            tokens, given, evidence: as in `infill`, (B, L).
            top: how many tokens of each position, in [1, V].
            temperature: by which its logits are divided.

        Returns: (ids int64, p float32), both (B, L, top), the likeliest tokens in descending order; a given one has 1, and -1 stands
            behind it, with 0.
        Errors: as `infill`; ValueError on an Autoregressive path, of which no position hears those after it.
        """
        if isinstance(self.path, Autoregressive):
            raise ValueError("path: got an Autoregressive one, allowed where a posterior is asked for is any other")
        top = check_int("top", top, 1, self.path.vocab_size, f"an integer in [1, V = {self.path.vocab_size}]")
        temperature = check_scalar("temperature", temperature, LEAST, MOST, f"a number in [{LEAST}, {MOST}]")
        tokens, given = self._checked(tokens, given)
        self._check_evidence(evidence, tokens)
        self._check_tokens(tokens, given)
        tokens, given = tokens.to(self.device), given.to(self.device)
        evidence = None if evidence is None else evidence.to(self.device)
        passes = Passes(self.network, self.path, tokens, given, [0] * len(tokens), evidence=evidence)
        with evaluating(self.network):
            state = self.path.renoise(passes.known, 0.0, passes.rng(0), given)
            ids, p = passes.predict(state, 0.0, given, evidence=passes.evidence).largest(top, temperature)
            passes.end()
        certain = torch.full_like(ids, -1)
        certain[..., 0] = tokens
        shown = given[..., None]
        return torch.where(shown, certain, ids), torch.where(shown, (certain >= 0).to(p.dtype), p)

    @torch.no_grad()
    def likelihood(
        self,
        tokens: Tensor,
        given: Tensor | None = None,
        options: SampleOptions | None = None,
        *,
        evidence: Evidence | None = None,
        progress: bool = False,
        **changes: Any,
    ) -> Likelihood:
        """-log p of texts under the sampler itself, exactly: for a method that draws sets of positions in a known order.

        That is "slices", "segments", and left to right on an Autoregressive path. The passes are those of sampling, at temperature
        1 and among all V tokens, whatever the options say of top_k, top_p and temperature.

        Args:
            tokens: (B, L) ids. given: (B, L) bool, tokens that are known and not counted; None: none.
            options, changes, evidence, progress: as in `infill`; with evidence it is -log p(tokens | what was observed).

        Raises:
            ValueError: an argument is outside its range or of a wrong shape, or a method that has no exact likelihood (see
                `Path.likelihood` for a bound); the message names it.
        """
        resolved = self._options(options, changes)
        way = way_of(self.path, resolved.method)
        if not _is_exact(way, resolved):
            raise ValueError(
                f"method: got {resolved.method!r} with slice_steps={resolved.slice_steps}, allowed where a likelihood is asked for is "
                f"one of {ordered_names()}, with 1"
            )
        tokens = token_ids("tokens", tokens).to(self.device)
        if tokens.dim() != 2:
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, allowed is (B, L)")
        _, counts = check_text(tokens, given)
        given = torch.zeros_like(tokens, dtype=torch.bool) if given is None else given.to(self.device)
        self._check_tokens(tokens, ~torch.zeros_like(given))
        self._check_evidence(evidence, tokens)
        if evidence is not None:
            evidence = evidence.to(self.device)
        nats = torch.zeros(len(tokens), dtype=torch.float64, device=self.device)
        keys = counts if wants_same_free(way) else torch.zeros_like(counts)
        with evaluating(self.network):
            for key in keys.unique().tolist():
                members = ((keys == key) & (counts > 0)).nonzero().flatten()
                if len(members):
                    some = None if evidence is None else evidence[members]
                    passes = Scoring(
                        self.network, self.path, tokens[members], given[members], progress=progress, evidence=some
                    )
                    way(passes, resolved)
                    passes.end()
                    nats[members] = passes.nats.sum(1)
        return Likelihood(nats, counts, exact=True)

    def batch_key(self, given: Tensor, options: SampleOptions | None = None, **changes: Any) -> tuple[int, int]:
        """Sequences with equal keys make their passes together, if their options are equal too.

        Args:
            given: (L,) bool, of one sequence. options, changes: as in `infill`.
        """
        return _key(way_of(self.path, self._options(options, changes).method), given)

    def has_likelihood(self, options: SampleOptions | None = None, **changes: Any) -> bool:
        """Whether `likelihood` and `log_likelihoods` have something to say of this method."""
        resolved = self._options(options, changes)
        return _is_exact(way_of(self.path, resolved.method), resolved)

    def log_likelihoods(
        self, samples: Samples, options: SampleOptions | None = None, **changes: Any
    ) -> list[float | None]:
        """The exact log-likelihood of each sequence, in nats per token that was not given, at most 0: that of `likelihood`.

        Args:
            samples: of this Sampler, without evidence. options, changes: those by which they were made.

        Returns: None for a sequence of which everything was given.
        Errors: as `likelihood`.
        """
        lengths: dict[int, list[int]] = {}
        for i, row in enumerate(samples.tokens):
            lengths.setdefault(len(row), []).append(i)
        found: list[float | None] = [None] * len(samples.tokens)
        for members in lengths.values():
            rows = (torch.stack([x[i] for i in members]) for x in (samples.tokens, samples.given))
            tokens, given = (row.to(self.device) for row in rows)
            likelihood = self.likelihood(tokens, given, options, **changes)
            for i, nats, count in zip(members, likelihood.nats.tolist(), likelihood.tokens.tolist(), strict=True):
                found[i] = -nats / count if count else None
        return found

    def _options(self, options: SampleOptions | None, changes: dict[str, Any]) -> ResolvedOptions:
        """What was asked for, with all that the path and the network say of it."""
        known = [field.name for field in fields(SampleOptions)]
        for name in changes:
            if name not in known:
                raise TypeError(f"{name}: got {changes[name]!r}, allowed are {', '.join(known)}")
        options = replace(SampleOptions() if options is None else options, **changes)
        path = self.path
        return ResolvedOptions.of(
            options,
            vocab_size=path.vocab_size,
            t_split=path.t_split,
            reads=path.reads,
            sparse=self.network.reads_posterior,
            default_method=self.default_method,
        )

    def _infill_ragged(
        self, tokens, given, seeds: list[int], way: Way, request: _Request, evidence: list[Evidence] | None
    ) -> Samples:
        if len(given) != len(tokens):
            raise ValueError(f"given: got {len(given)} sequences, allowed are as many as tokens has, {len(tokens)}")
        start = time.perf_counter()
        tokens = [token_ids(f"tokens: number {i}", x) for i, x in enumerate(tokens)]
        given = [torch.as_tensor(x, dtype=torch.bool, device="cpu") for x in given]
        groups: dict[tuple[int, int], list[int]] = {}
        for i, (row, flags) in enumerate(zip(tokens, given, strict=True)):
            if row.dim() != 1 or flags.shape != row.shape:
                raise ValueError(
                    f"given: number {i} has shape {tuple(flags.shape)}, allowed is that of its tokens, {tuple(row.shape)}"
                )
            self._check_tokens(row, flags)
            groups.setdefault(_key(way, flags), []).append(i)
        found: list[Tensor] = list(tokens)
        passes: list[list[Tensor]] = [[] for _ in tokens]
        nfe = 0
        for members in groups.values():
            rows, flags = (torch.stack([x[i] for i in members]) for x in (tokens, given))
            some = None if evidence is None else Evidence.stack([evidence[i] for i in members])
            result = self._infill(rows, flags, [seeds[i] for i in members], way, request, some, members)
            nfe = max(nfe, result.nfe)
            for j, i in enumerate(members):
                found[i] = result.tokens[j]
                passes[i] = [x[j] for x in result.history]
        history = [[p[n] if n < len(p) else x for p, x in zip(passes, found, strict=True)] for n in range(nfe)]
        history = history if request.return_history else []
        return self._samples(found, nfe, start, history, seeds, given)

    def _samples(self, tokens: Any, nfe: int, start: float, history: Any, seeds: list[int], given: Any) -> Samples:
        return Samples(tokens, nfe, time.perf_counter() - start, history, list(seeds), self.tokenizer, given)

    @staticmethod
    def _checked(tokens: Tensor, given) -> tuple[Tensor, Tensor]:
        """Both as tensors of one shape (B, L)."""
        tokens = token_ids("tokens", tokens)
        if tokens.dim() != 2:
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, allowed is (B, L)")
        given = given if isinstance(given, Tensor) else torch.as_tensor(given, device="cpu")
        if given.shape != tokens.shape or given.dtype != torch.bool:
            raise ValueError(
                f"given: got {given.dtype} of shape {tuple(given.shape)}, allowed is bool of the (B, L) shape of tokens, "
                f"{tuple(tokens.shape)}"
            )
        return tokens, given

    def _check_length(self, name: str, length: int) -> None:
        most = self.network.max_length
        if most is not None and length > most:
            raise ValueError(f"{name}: got a length of {length}, allowed is at most the model's max_length, {most}")

    def _check_tokens(self, tokens: Tensor, given: Tensor) -> None:
        self._check_length("tokens", tokens.shape[-1])
        vocab = self.path.vocab_size
        bad = given & ((tokens < 0) | (tokens >= vocab))
        if bool(bad.any()):
            raise ValueError(f"tokens: got {tokens[bad][0].item()} where given, allowed is 0 to V - 1 = {vocab - 1}")

    def _check_evidence(self, evidence: Any, tokens: Tensor) -> Evidence | None:
        if evidence is None:
            return None
        if not isinstance(evidence, Evidence):
            raise TypeError(f"evidence: got {type(evidence).__name__}, allowed is an Evidence")
        shape, vocab = tuple(tokens.shape), self.path.vocab_size
        if tuple(evidence.ids.shape[:2]) != shape:
            raise ValueError(
                f"evidence: got one of {tuple(evidence.ids.shape[:2])} positions, allowed is that of tokens, {shape}"
            )
        most = int(evidence.ids.max()) if evidence.ids.numel() else -1
        if most >= vocab:
            raise ValueError(f"evidence: got the token {most}, allowed is 0 to V - 1 = {vocab - 1}")
        return evidence

    def _each(self, evidence, tokens) -> list[Evidence] | None:
        """Of a list of sequences, of one each."""
        if evidence is None:
            return None
        if isinstance(evidence, Evidence) or len(evidence) != len(tokens):
            got = "one" if isinstance(evidence, Evidence) else f"{len(evidence)}"
            raise ValueError(f"evidence: got {got}, allowed is a list of as many as tokens has, {len(tokens)}")
        for some, row in zip(evidence, tokens, strict=True):
            self._check_evidence(some, torch.empty(1, len(row)))
        return list(evidence)

    def _infill(
        self,
        tokens: Tensor,
        given: Tensor,
        seeds: list[int],
        way: Way,
        request: _Request,
        evidence: Evidence | None,
        members: list[int] | None = None,
    ) -> Samples:
        start = time.perf_counter()
        tokens, given = tokens.to(self.device).long(), given.to(self.device)
        self._check_tokens(tokens, given)
        if tokens.numel() == 0 or bool(given.all()):
            return self._samples(tokens.clone(), 0, start, [], seeds, given)
        members = list(range(len(tokens))) if members is None else members
        passes = Passes(
            self.network,
            self.path,
            tokens,
            given,
            seeds,
            watcher=None if request.watch is None else Watcher(request.watch, request.top, members),
            progress=request.progress,
            return_history=request.return_history,
            evidence=None if evidence is None else evidence.to(self.device),
        )
        with evaluating(self.network):
            found = (self._replays or way)(passes, request.options)
            passes.end()
        found = torch.where(given, tokens, found)
        if found.is_cuda:
            torch.cuda.synchronize(found.device)  # seconds are those of the work, not of its launches
        return self._samples(found, passes.count, start, passes.history, seeds, given)


def _is_exact(way: Way, options: ResolvedOptions) -> bool:
    """Whether a way has an exact likelihood with these options."""
    return is_ordered(way) and options.slice_steps == 1


def _key(way: Way, given: Tensor) -> tuple[int, int]:
    """Of a sequence; those with equal ones can go through together."""
    return len(given), int((~given).sum()) if wants_same_free(way) else 0
