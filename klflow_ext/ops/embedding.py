"""The network's input: noisy rows, or their posteriors, as embeddings, with no (rows x V) tensor."""

import torch
from torch import Tensor

from klflow_ext.ops.arguments import (
    FLOATS,
    INTEGERS,
    Rng,
    Scalar,
    boost_rows,
    check_int,
    check_log_prior,
    check_tensor,
    check_tokens,
    fail,
    looks_at_values,
    noise_arguments,
    refuse_gradient,
    register_fake_mutation,
)
from klflow_ext.ops.posterior import largest_entries
from klflow_ext.ops.products import add_product

_klflow = torch.ops.klflow

# Rows and columns of the tiles that the dense forms multiply. On a CPU one tile of noise, of the weight and of the result
# stay in the L3 cache; a GPU has as many rows as keep all its multiprocessors at work (192 blocks of 128 x 256 at D = 768).
TILE = {"cpu": (512, 2048), "cuda": (8192, 4096)}
PITCH = {"cpu": 1, "cuda": 64}  # the rows of a tile begin at a multiple of so many elements: a product on CUDA needs it


def noise_embedding(
    target: Tensor,
    t: Scalar,
    weight: Tensor,
    rng: Rng,
    *,
    beta: float = 0.01,
    given: Tensor | None = None,
    row_offset: int = 0,
    log_prior: Tensor | None = None,
    top: int | None = 512,
    boost: Tensor | None = None,
) -> Tensor:
    """Noisy rows as embeddings, x_t @ weight, or their posteriors, q @ weight; x_t and q are never built.

    Without log_prior: x_t of `noise_interpolate(target, t, rng)` times the weight. With it: q of `noise_posterior`, either
    all of it (top=None) or its `top` largest entries and their rest as `posterior_embedding` does it, a hundred times less
    arithmetic, and exact at t = 0. The backward pass of the dense products makes the noise again. A given row is exactly
    weight[target].

    Args:
        target, t, rng, beta, given, row_offset: as in `noise_interpolate`.
        weight: (V, D), as torch.nn.Embedding holds it; float32, bfloat16 or float16.
        log_prior: None or (V,) log-probabilities of the tokens up to a constant.
        top: with log_prior, the entries kept of each row (from V on all of them), or None for the dense product.
        boost: with log_prior and top, None or floats (*rows, K), target then (*rows, K) too: see `noise_posterior`.

    Returns: (*rows, D) in the dtype of weight, sums in float32. Differentiable in weight only.
    Errors: TypeError, ValueError; IndexError for a target outside [0, V).
    """
    check_tensor("target", target, INTEGERS)
    weight = _check_weight(weight, target.device)
    vocab, width = weight.shape
    if log_prior is not None:
        log_prior = check_log_prior(log_prior, vocab, target.device)
    if top is not None:
        top = check_int("top", top, 1, 2**30, "None or an integer >= 1")
    if boost is not None and (log_prior is None or top is None):
        fail(ValueError, "boost", type(boost).__name__, "None unless log_prior and top are given")
    boost = boost_rows(boost, target)
    noise, options = noise_arguments(target, t, rng, beta, given, row_offset, vocab, boost)
    if log_prior is None or top is None:
        out = _embed_dense(noise, weight, log_prior, options)
    else:
        ids, q, rest = largest_entries(noise, options, log_prior, min(top, vocab), boost)
        out = _embed(ids, q, rest, weight, log_prior)
    return out.reshape(*(target.shape if boost is None else target.shape[:-1]), width)


def posterior_embedding(
    ids: Tensor,
    q: Tensor,
    rest: Tensor,
    weight: Tensor,
    log_prior: Tensor,
) -> Tensor:
    """Sparse posteriors as embeddings: their entries, gathered, and the mean of the other tokens for the rest of the mass.

    sum_i q_i weight[ids_i] + rest (sum_{j not in ids} prior_j weight_j) / (1 - prior[ids].sum()), prior = softmax(log_prior):
    what `noise_embedding(..., log_prior=, top=)` does with the (ids, q, rest) of `noise_posterior`, for those of
    `token_posterior` too.

    Args:
        ids: int32 or int64 (*rows, top), in [0, V), different within a row.
        q: floats (*rows, top).
        rest: floats (*rows).
        weight: (V, D), as torch.nn.Embedding holds it; float32, bfloat16 or float16.
        log_prior: (V,) log-probabilities of the tokens up to a constant.

    Returns: (*rows, D) in the dtype of weight, sums in float32. Differentiable in weight only.
    Errors: TypeError, ValueError; IndexError for an id outside [0, V) (on CUDA and under torch.compile its row is NaN;
        KLFLOW_CHECK=1 checks).
    """
    check_tensor("ids", ids, INTEGERS)
    weight = _check_weight(weight, ids.device)
    vocab, width = weight.shape
    log_prior = check_log_prior(log_prior, vocab, ids.device)
    check_tensor("q", q, (*FLOATS, torch.float64), ids.device)
    check_tensor("rest", rest, (*FLOATS, torch.float64), ids.device)
    refuse_gradient("q", q, "weight")
    refuse_gradient("rest", rest, "weight")
    if ids.dim() < 1 or ids.shape[-1] < 1:
        fail(ValueError, "ids", f"shape {tuple(ids.shape)}", "(*rows, top >= 1)")
    shape, top = ids.shape[:-1], ids.shape[-1]
    if q.shape != ids.shape:
        fail(ValueError, "q", f"shape {tuple(q.shape)}", f"that of ids, {tuple(ids.shape)}")
    if rest.shape != shape:
        fail(ValueError, "rest", f"shape {tuple(rest.shape)}", f"that of the rows of ids, {tuple(shape)}")
    ids, q = ids.reshape(-1, top), q.detach().float().reshape(-1, top)
    if looks_at_values(ids):
        check_tokens("ids", ids, vocab)
    else:
        q = torch.where((ids >= 0) & (ids < vocab), q, torch.nan)
        ids = ids.clamp(0, vocab - 1)
    ids, rest = ids.int().contiguous(), rest.detach().float().reshape(-1).contiguous()
    return _embed(ids, q.contiguous(), rest, weight, log_prior).reshape(*shape, width)


class _LinearMap(torch.autograd.Function):
    """there(x), a linear map whose transpose is `back`: its gradient of any order and its tangent are one or the other again."""

    @staticmethod
    def forward(x, there, back):
        return there(x.detach())

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.there, ctx.back = inputs
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx, upstream):
        return _LinearMap.apply(upstream, ctx.back, ctx.there).to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _LinearMap.apply(tangent.contiguous(), ctx.there, ctx.back)

    @staticmethod
    def vmap(info, in_dims, *_):
        raise NotImplementedError("weight: got a batch of them under vmap, allowed is one; embed with each in a loop")


def _check_weight(weight, device):
    check_tensor("weight", weight, FLOATS, device)
    if weight.dim() != 2 or weight.shape[0] < 2 or weight.shape[1] < 1:
        fail(ValueError, "weight", f"shape {tuple(weight.shape)}", "(V, D) with V >= 2 and D >= 1")
    return weight if weight.stride(1) == 1 else weight.contiguous()


# ---- the dense forms: tile by tile, the noise of a tile in one buffer that is used again


def _tiles(rows, vocab, device):
    """Row chunks and column tiles of the noise."""
    height, breadth = TILE[device.type]
    return [slice(i, min(i + height, rows)) for i in range(0, rows, height)], [
        slice(j, min(j + breadth, vocab)) for j in range(0, vocab, breadth)
    ]


def _tile_dtype(weight_dtype, device):
    """That of a tile. float16 would overflow: the target's unnormalised entry reaches V / beta."""
    return torch.bfloat16 if device.type == "cuda" and weight_dtype == torch.bfloat16 else torch.float32


class _Noise:
    """The rows' noise, from which any tile can be made."""

    def __init__(self, target, t, rng, given, log_prior, stats, beta, row_offset, vocab, dtype):
        self.rows = (target, t, rng, given)
        self.log_prior, self.stats, self.beta, self.row_offset, self.vocab = log_prior, stats, beta, row_offset, vocab
        (height, breadth), device = TILE[target.device.type], target.device
        self.pitch = PITCH[device.type]
        size = min(height, target.shape[0]) * self.padded(min(breadth, vocab))
        self.buffer = torch.empty(size, dtype=dtype, device=device)

    def padded(self, breadth):
        return -(-breadth // self.pitch) * self.pitch

    def tile(self, rows, columns, total=None):
        """(rows, columns) of y, whose sums are added to total, or of q."""
        target, t, rng, given = self.rows
        height, breadth = rows.stop - rows.start, columns.stop - columns.start
        wide = self.padded(breadth)
        out = self.buffer[: height * wide].view(height, wide)[:, :breadth]
        dense = self.log_prior is not None
        _klflow.noise_tile(
            target[rows], t[rows], rng if rng.dim() == 1 else rng[rows], None if given is None else given[rows],
            self.log_prior, self.stats[rows] if dense else None, self.beta, self.row_offset + rows.start, self.vocab,
            columns.start, False, None if dense else (self.scratch(height) if total is None else total[rows]), out,
        )  # fmt: skip
        return out

    def scratch(self, rows):
        return torch.zeros(rows, dtype=torch.float64, device=self.buffer.device)


@torch.library.custom_op("klflow::noise_embedding", mutates_args=())
def _dense(
    target: Tensor, t: Tensor, rng: Tensor, given: Tensor | None, weight: Tensor, log_prior: Tensor | None, beta: float,
    row_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The embeddings and what the backward pass needs of the forward: the rows' sums, or their posterior's stats."""
    rows, (vocab, width), device = target.shape[0], weight.shape, weight.device
    if log_prior is None:
        stats = torch.zeros(rows, dtype=torch.float64, device=device)
    else:
        stats = torch.empty(rows, 3, dtype=torch.float32, device=device)
        largest_entries((target, t, rng, given), (beta, row_offset), log_prior, 0, stats=stats)
    dtype = _tile_dtype(weight.dtype, device)
    noise = _Noise(target, t, rng, given, log_prior, stats, beta, row_offset, vocab, dtype)
    out = torch.empty(rows, width, dtype=weight.dtype, device=device)
    row_chunks, column_tiles = _tiles(rows, vocab, device)
    for chunk in row_chunks:
        total = torch.empty(chunk.stop - chunk.start, width, dtype=torch.float32, device=device)
        for columns in column_tiles:
            tile = noise.tile(chunk, columns, stats)
            add_product(total, tile, weight[columns].to(tile.dtype), columns.start == 0)
        out[chunk] = total if log_prior is not None else total.div_(stats[chunk, None])
    return out, stats


@torch.library.custom_op("klflow::noise_embedding_backward", mutates_args=())
def _dense_backward(
    dout: Tensor, stats: Tensor, target: Tensor, t: Tensor, rng: Tensor, given: Tensor | None, log_prior: Tensor | None,
    beta: float, row_offset: int, vocab: int,
) -> Tensor:  # fmt: skip
    rows, width, device = target.shape[0], dout.shape[1], dout.device
    dtype = _tile_dtype(dout.dtype, device)
    noise = _Noise(target, t, rng, given, log_prior, stats, beta, row_offset, vocab, dtype)
    scaled = (dout.float() if log_prior is not None else dout / stats[:, None]).to(dtype)
    dweight = (torch.empty if rows else torch.zeros)(vocab, width, dtype=torch.float32, device=device)
    row_chunks, column_tiles = _tiles(rows, vocab, device)
    for columns in column_tiles:
        for chunk in row_chunks:
            add_product(dweight[columns], noise.tile(chunk, columns).T, scaled[chunk], chunk.start == 0)
    return dweight


def _embed_dense(noise, weight, log_prior, options):
    if torch.compiler.is_compiling():
        return _dense(*noise, weight, log_prior, *options)[0]
    stats = None  # of the noise alone, so of the first call; the others need them

    def there(weight):
        nonlocal stats
        out, stats = _dense(*noise, weight, log_prior, *options)
        return out

    def back(dout):
        return _dense_backward(dout, stats, *noise, log_prior, *options, len(weight))

    return _LinearMap.apply(weight, there, back)


# ---- the sparse form


def _mean(prior, weight):
    """prior @ weight in float32: gather_rows of all tokens, in groups that it handles in parallel."""
    (vocab, width), device = weight.shape, weight.device
    groups = (vocab + 511) // 512
    ids = torch.arange(groups * 512, dtype=torch.int32, device=device).clamp_(max=vocab - 1).view(groups, 512)
    share = torch.zeros(groups * 512, dtype=torch.float32, device=device)
    share[:vocab] = prior
    nothing = torch.zeros(max(groups, width), dtype=torch.float32, device=device)
    sums = torch.empty(groups, width, dtype=torch.float32, device=device)
    _klflow.gather_rows(ids, share.view(groups, 512), nothing[:groups], weight, nothing[:width], sums)
    return sums.sum(0)


def _group_by_token(ids, vocab):
    """(order, starts): positions in ids.reshape(-1) sorted by id, stable; where each id's group begins."""
    if ids.device.type == "cpu":
        order = torch.empty(ids.numel(), dtype=torch.int32, device=ids.device)
        starts = torch.empty(vocab + 1, dtype=torch.int64, device=ids.device)
        _klflow.group_by_token(ids, vocab, order, starts)
        return order, starts
    tokens, order = ids.reshape(-1).sort(stable=True)
    starts = torch.searchsorted(tokens, torch.arange(vocab + 1, dtype=torch.int32, device=ids.device))
    return order.int(), starts


def _shares(ids, q, rest, prior):
    """(a, b) with sum_i q_i weight[ids_i] + rest (mean of the others) = sum_i a_i weight[ids_i] + b (prior @ weight)."""
    own = prior[ids]
    others = prior.double().sum() - own.double().sum(-1)
    # Mass that rounding alone leaves over is not shared out.
    b = torch.where((rest.abs() > 1e-7) & (others > 1e-6), rest / others, 0.0)
    b = torch.where(rest.isnan(), rest, b).float()
    return q.addcmul(own, b[:, None], value=-1), b


def _embed(ids, q, rest, weight, log_prior):
    prior = log_prior.softmax(0)
    entries = (ids, *_shares(ids, q, rest, prior))
    if torch.compiler.is_compiling():
        return _sparse(*entries, weight, prior)
    there, back = (lambda w: _sparse(*entries, w, prior)), (lambda dout: _sparse_backward(dout, *entries, prior))
    return _LinearMap.apply(weight, there, back)


@torch.library.custom_op("klflow::embed_rows", mutates_args=())
def _sparse(ids: Tensor, q: Tensor, rest: Tensor, weight: Tensor, prior: Tensor) -> Tensor:
    """sum_i q_i weight[ids_i] + rest (prior @ weight)."""
    out = torch.empty(ids.shape[0], weight.shape[1], dtype=weight.dtype, device=weight.device)
    _klflow.gather_rows(ids, q, rest, weight, _mean(prior, weight), out)
    return out


@torch.library.custom_op("klflow::embed_rows_backward", mutates_args=())
def _sparse_backward(dout: Tensor, ids: Tensor, q: Tensor, rest: Tensor, prior: Tensor) -> Tensor:
    dout = dout.contiguous()
    dweight = torch.empty(prior.shape[0], dout.shape[1], dtype=torch.float32, device=dout.device)
    order, starts = _group_by_token(ids, prior.shape[0])
    _klflow.scatter_rows(order, starts, q, prior, rest @ dout.float(), dout, dweight)
    return dweight


# ---- fake kernels and gradients

for _name in ("noise_tile", "gather_rows", "scatter_rows", "group_by_token"):
    register_fake_mutation(_name)


@_dense.register_fake
def _(target, t, rng, given, weight, log_prior, beta, row_offset):
    rows = target.shape[0]
    if log_prior is None:
        stats = weight.new_empty(rows, dtype=torch.float64)
    else:
        stats = weight.new_empty((rows, 3), dtype=torch.float32)
    return weight.new_empty((rows, weight.shape[1])), stats


@_dense_backward.register_fake
def _(dout, stats, target, t, rng, given, log_prior, beta, row_offset, vocab):
    return dout.new_empty((vocab, dout.shape[1]), dtype=torch.float32)


@_sparse.register_fake
def _(ids, q, rest, weight, prior):
    return weight.new_empty((ids.shape[0], weight.shape[1]))


@_sparse_backward.register_fake
def _(dout, ids, q, rest, prior):
    return dout.new_empty((prior.shape[0], dout.shape[1]), dtype=torch.float32)


def _setup_dense(ctx, inputs, output):
    target, t, rng, given, weight, log_prior, beta, row_offset = inputs
    ctx.save_for_backward(output[1], target, t, rng, given, log_prior)
    ctx.options, ctx.dtype = (beta, row_offset, weight.shape[0]), weight.dtype


def _backward_dense(ctx, dout, dstats):
    dweight = _dense_backward(dout, *ctx.saved_tensors, *ctx.options).to(ctx.dtype)
    return None, None, None, None, dweight, None, None, None


def _setup_sparse(ctx, inputs, output):
    ids, q, rest, weight, prior = inputs
    ctx.save_for_backward(ids, q, rest, prior)
    ctx.dtype = weight.dtype


def _backward_sparse(ctx, dout):
    return None, None, None, _sparse_backward(dout, *ctx.saved_tensors).to(ctx.dtype), None


_dense.register_autograd(_backward_dense, setup_context=_setup_dense)
_sparse.register_autograd(_backward_sparse, setup_context=_setup_sparse)
