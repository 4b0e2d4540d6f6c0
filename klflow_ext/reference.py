"""Plain PyTorch twins of `ops`: the same signatures, a few readable lines each, in the dtype of their floating input.

Float64 inputs (or dtype=torch.float64) give the oracle that the tests judge every kernel by. Noise words follow the same
contract bit for bit; -log U is then taken in the working dtype. Nothing here is fast, and arguments are not checked.
"""

import math

import torch

SIMPLEX_NOISE, TOKEN_DRAW_HIGH, TOKEN_DRAW_LOW = 0, 1, 2  # streams of the noise contract


def gap(vocab_size, beta):
    """c = log(V / beta - V + 1), the logit gap of x_1 = (1 - beta) onehot + beta / V."""
    return math.log(vocab_size / beta - vocab_size + 1)


# ---- noise


def philox(counter, key):
    """Philox4x32-10 (Salmon et al., SC'11) on int64 tensors that hold 32-bit words: four words per counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    mask = 0xFFFFFFFF

    def product(m, c):  # (high, low) words of a 32 x 32 bit product; int64 wraps, so split the multiplicand
        low_part, high_part = m * (c & 0xFFFF), m * (c >> 16)
        total = low_part + ((high_part & 0xFFFF) << 16)
        return ((high_part >> 16) + (total >> 32)) & mask, total & mask

    for _ in range(10):
        high0, low0 = product(0xD2511F53, c0)
        high1, low1 = product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def state_of(rng, shape=(), row_offset=0):
    """An int seed, torch.Generator or int64 tensor as (seed, step) pairs, (1, 2) or (rows, 2); or, for rows of this shape
    and a state for each of its sequences, (rows, 3) of (seed, step, row within the sequence). A generator advances once."""
    if isinstance(rng, torch.Generator):
        rng = int(torch.randint(2**63 - 1, (), generator=rng, device=rng.device))
    if isinstance(rng, int):
        rng = torch.tensor([rng - 2**64 if rng >= 2**63 else rng, 0])
    if len(shape) > 1 and rng.shape == (*shape[:-1], 2):
        row = torch.arange(row_offset, row_offset + shape[-1], device=rng.device).expand(shape)
        rng = torch.cat([rng[..., None, :].expand(*shape, 2), row[..., None]], -1)
    return rng.reshape(-1, rng.shape[-1])


def key_of_row(seed, row):
    """The key's high word of rows (int64)."""
    return (seed >> 32 ^ (row >> 32) * 0x9E3779B9) & 0xFFFFFFFF


def words(rows, vocab_size, rng, stream, row_offset=0, device=None):
    """(rows, V) words of one stream, as int64: key = seed, counter = (column // 4, row, step, stream), lane column % 4.

    Rows from 2^32 on: what is above 32 bits, times 0x9E3779B9, enters the key's high word by exclusive or.
    """
    pairs = state_of(rng).to(device)
    pairs = pairs.expand(rows, pairs.shape[1])
    mask = 0xFFFFFFFF
    column = torch.arange((vocab_size + 3) // 4, device=device)[None, :]
    own = pairs[:, 2] if pairs.shape[1] == 3 else torch.arange(rows, device=device) + row_offset
    row = (own & mask)[:, None]
    seed, step = pairs[:, :1], pairs[:, 1:2] & mask
    key = (seed & mask, key_of_row(seed, own[:, None]))
    zero = torch.zeros(rows, column.shape[1], dtype=torch.int64, device=device)
    out = philox((zero + column, zero + row, zero + step, zero + stream), key)
    return torch.stack(out, -1).reshape(rows, 4 * column.shape[1])[:, :vocab_size]


def simplex_noise(rows, vocab_size, rng, row_offset=0, dtype=torch.float64, device=None):
    """(rows, V) of E_j ~ Exp(1) in [6e-8, 22.9], the noise whose E / sum(E) is Dirichlet(1, ..., 1).

    Equivalent to, with the uniform in float32 as the contract says (stream 0):
        w = words(rows, vocab_size, rng, 0, row_offset)
        result = -((w.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24).to(dtype).log()
    """
    w = words(rows, vocab_size, rng, SIMPLEX_NOISE, row_offset, device)
    uniform = ((w.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -uniform.to(dtype).log()


def token_exponential(rows, vocab_size, rng, row_offset=0, dtype=torch.float64, device=None):
    """(rows, V) of E_j ~ Exp(1) for token draws, accurate down to 2^-65: small E decides which token wins.

    Equivalent to, with v in float32 (streams 1 and 2):
        high, low = words(rows, vocab_size, rng, 1, row_offset), words(rows, vocab_size, rng, 2, row_offset)
        v = high.float() * 2.0**-32 + (low.float() + 0.5) * 2.0**-64
        result = -torch.log1p(-v.clamp(max=1 - 2.0**-24).to(dtype))
    """
    high = words(rows, vocab_size, rng, TOKEN_DRAW_HIGH, row_offset, device)
    low = words(rows, vocab_size, rng, TOKEN_DRAW_LOW, row_offset, device)
    v = high.float() * 2.0**-32 + (low.float() + 0.5) * 2.0**-64
    return -torch.log1p(-v.clamp(max=1 - 2.0**-24).to(dtype))


# ---- helpers


def _rows(value, shape, dtype=None, device=None):
    return torch.as_tensor(value, dtype=dtype, device=device).expand(shape).reshape(-1, 1)


def _onehot_rows(x, given, known, shape, log=False):
    """x with its given rows replaced by exactly onehot(known) (or the logarithm of it)."""
    if given is None:
        return x
    known = _rows(known, shape, torch.int64, x.device)
    onehot = torch.zeros_like(x).scatter_(1, known.clamp(0, x.shape[1] - 1), 1.0)
    return torch.where(_rows(given, shape, device=x.device), onehot.log() if log else onehot, x)


# ---- the twins


def noise_interpolate(
    target, t, rng, *, vocab_size, beta=0.01, given=None, row_offset=0, dtype=None, log=False, out=None,
    output="simplex", log_prior=None,
):  # fmt: skip
    """x_t = softmax((1 - t) log E + t c onehot(target)), E the noise of the contract; given rows are onehot(target). With
    output="posterior", the row q of `noise_posterior` instead, all of it.

    Equivalent to, for target (rows,) and t (rows,), c = log(V / beta - V + 1):
        log_e = simplex_noise(len(target), vocab_size, rng, row_offset).log()
        onehot = torch.nn.functional.one_hot(target, vocab_size)
        result = ((1 - t)[:, None] * log_e + t[:, None] * gap(vocab_size, beta) * onehot).softmax(-1)
    for output="posterior":
        ids, q, rest = noise_posterior(
            target, t, rng, log_prior, top=vocab_size, beta=beta, given=given, row_offset=row_offset)
        result = q.log() if log else q
    """
    dtype = dtype or (torch.float32 if out is None else out.dtype)
    shape, device = target.shape, target.device
    work = torch.float64 if dtype == torch.float64 else torch.float32
    if output == "posterior":
        x = _posterior_rows(target, t, rng, log_prior.to(work), beta, given, row_offset)
        x = (x if log else x.exp()).to(dtype).reshape(*shape, vocab_size)
        return x if out is None else out.copy_(x)
    e = simplex_noise(target.numel(), vocab_size, state_of(rng, shape, row_offset), row_offset, work, device)
    t = _rows(t, shape, work, device)
    k = target.reshape(-1, 1).long()
    l = (1 - t) * e.log()
    l = l.scatter_add(1, k, t * gap(vocab_size, beta))
    x = l.log_softmax(-1) if log else l.softmax(-1)
    x = _onehot_rows(x, given, target, shape, log).to(dtype).reshape(*shape, vocab_size)
    return x if out is None else out.copy_(x)


def _log_evidence(m, s):
    """e_j = -V log(1 - (1 - e^-s) u_j), u = softmax(m), for m (rows, V) and s (rows, 1).

    The largest u may be so near 1 that its logarithm is that of e^-s + (1 - u) / u, 1 - u summed over the others.
    """
    vocab = m.shape[-1]
    log_u = m.log_softmax(-1)
    top = log_u.argmax(-1, keepdim=True)
    own, others = log_u.gather(-1, top), log_u.scatter(-1, top, -math.inf).logsumexp(-1, keepdim=True)
    share = torch.log(-torch.expm1(-s))
    evidence = -vocab * torch.log1p(torch.expm1(-s) * log_u.exp())
    return evidence.scatter(
        -1, top, vocab * torch.logaddexp(torch.zeros_like(own), share + own - torch.logaddexp(others, own - s))
    )


def _posterior_rows(target, t, rng, log_prior, beta, given, row_offset, boost=None):
    """log q of flattened rows, in the dtype of log_prior (float64 or float32)."""
    vocab, device = log_prior.shape[0], target.device
    shape = target.shape if boost is None else target.shape[:-1]
    work = torch.float64 if log_prior.dtype == torch.float64 else torch.float32
    e = simplex_noise(shape.numel(), vocab, state_of(rng, shape, row_offset), row_offset, work, device)
    t = _rows(t, shape, work, device)
    s = gap(vocab, beta) * t / (1 - t)
    k = (
        (target[..., None] if boost is None else target)
        .reshape(len(e), target.shape[-1] if boost is not None else 1)
        .long()
    )
    if boost is None:
        certain = ~(s < 80)  # t = 1 too: every other token's posterior is below the smallest float32
        s = torch.where(certain, 0.0, s)
        boost = s
    else:
        certain = torch.zeros_like(s, dtype=torch.bool)
        boost = torch.where(k < 0, 0.0, boost.to(work).reshape(k.shape).clamp(-60, 60))
    m = e.log().scatter_add(1, k.clamp(min=0), boost)
    log_q = (log_prior.to(work) + _log_evidence(m, s)).log_softmax(-1)
    known = k[:, :1].clamp(min=0)
    log_q = torch.where(certain, torch.full_like(log_q, -math.inf).scatter(1, known, 0.0), log_q)
    return _onehot_rows(log_q, given, known.reshape(shape), shape, log=True)


def _largest_entries(log_q, top, shape):
    """(ids, q, rest) of flattened rows of log q."""
    ids = log_q.argsort(dim=-1, descending=True, stable=True)[:, :top].sort(-1).values
    full = log_q.exp()
    q = full.gather(1, ids)
    rest = full.scatter(1, ids, 0.0).sum(-1)
    return ids.int().reshape(*shape, top), q.reshape(*shape, top), rest.reshape(shape)


def noise_posterior(target, t, rng, log_prior, *, top=512, beta=0.01, given=None, row_offset=0, boost=None):
    """(ids, q, rest) of q = softmax(log_prior + e): its `top` largest entries by ascending id, and the others' mass.

    e_j = -V log(1 - (1 - e^-s) u_j) is the log-likelihood of token j given x_t, with u = softmax(log x_t / (1 - t)) and
    s = c t / (1 - t), c = log(V / beta - V + 1). A given row, and one at t = 1, is onehot(target). With boost (*rows, K)
    and target (*rows, K), u = softmax(log E + sum_i boost_i onehot(target_i)), E the noise; target -1 is an unused slot.

    Equivalent to, for target (rows,) and t < 1 (rows,) where nothing is given:
        log_x = noise_interpolate(target, t, rng, vocab_size=V, beta=beta, row_offset=row_offset, log=True)
        u = (log_x / (1 - t)[:, None]).softmax(-1)
        s = gap(V, beta) * t / (1 - t)
        full = (log_prior + -V * torch.log1p(torch.expm1(-s)[:, None] * u)).softmax(-1)
        ids = full.argsort(dim=-1, descending=True, stable=True)[:, :top].sort(-1).values
        q = full.gather(1, ids)
        result = ids, q, 1 - q.sum(-1)
    """
    log_q = _posterior_rows(target, t, rng, log_prior, beta, given, row_offset, boost)
    return _largest_entries(log_q, top, target.shape if boost is None else target.shape[:-1])


def token_posterior(log_x, t, log_prior, *, top=512, beta=0.01):
    """(ids, q, rest) of `noise_posterior` from the rows log x_t (up to a constant each) instead of their noise. A row with
    one entry above -infinity, and at t = 1 any, is onehot of its largest.

    Equivalent to, for log_x (rows, V) and t < 1 (rows,):
        u = (log_x / (1 - t)[:, None]).softmax(-1)
        s = gap(V, beta) * t / (1 - t)
        full = (log_prior + -V * torch.log1p(torch.expm1(-s)[:, None] * u)).softmax(-1)
        ids = full.argsort(dim=-1, descending=True, stable=True)[:, :top].sort(-1).values
        q = full.gather(1, ids)
        result = ids, q, 1 - q.sum(-1)
    """
    shape, vocab = log_x.shape[:-1], log_x.shape[-1]
    work = torch.float64 if log_x.dtype == torch.float64 else torch.float32
    log_x = log_x.reshape(-1, vocab).to(work)
    t = _rows(t, shape, work, log_x.device)
    top_entry = log_x.argmax(-1, keepdim=True)
    certain = (t == 1) | ((log_x > -math.inf).sum(-1, keepdim=True) == 1)
    t = torch.where(certain, 0.0, t)
    evidence = _log_evidence(log_x / (1 - t), gap(vocab, beta) * t / (1 - t))
    log_q = (log_prior.to(work) + evidence).log_softmax(-1)
    log_q = torch.where(certain, torch.full_like(log_q, -math.inf).scatter(1, top_entry, 0.0), log_q)
    return _largest_entries(log_q, top, shape)


def posterior_embedding(ids, q, rest, weight, log_prior):
    """sum_i q_i weight[ids_i] + rest (the mean of the other tokens' embeddings under the prior).

    Equivalent to, for ids (rows, top), in the dtype of weight:
        others = log_prior.softmax(0).expand(len(ids), -1).scatter(-1, ids.long(), 0.0)
        others = rest[:, None] * others / others.sum(-1, keepdim=True)
        result = others.scatter(-1, ids.long(), q) @ weight
    """
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    others = log_prior.to(work).softmax(0).expand(*rest.shape, len(weight)).scatter(-1, ids.long(), 0.0)
    others = rest.to(work)[..., None] * others / others.sum(-1, keepdim=True).clamp_min(1e-30)
    return (others.scatter(-1, ids.long(), q.to(work)) @ weight.to(work)).to(weight.dtype)


def noise_embedding(
    target, t, weight, rng, *, beta=0.01, given=None, row_offset=0, log_prior=None, top=512, boost=None
):
    """x_t @ weight; with log_prior q @ weight, where the entries of q beyond the `top` largest are those of the prior, scaled
    to the mass that is left.

    Equivalent to, in the dtype of weight:
        if log_prior is None:
            result = noise_interpolate(target, t, rng, vocab_size=len(weight), ...) @ weight
        elif top is None:
            ids, q, rest = noise_posterior(target, t, rng, log_prior, top=len(weight), ...)
            result = q @ weight
        else:
            ids, q, rest = noise_posterior(target, t, rng, log_prior, top=top, boost=boost, ...)
            result = posterior_embedding(ids, q, rest, weight, log_prior)
    """
    vocab, width = weight.shape
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    options = {"beta": beta, "given": given, "row_offset": row_offset}
    matrix = weight.to(work)
    if log_prior is None:
        out = noise_interpolate(target, t, rng, vocab_size=vocab, dtype=work, **options) @ matrix
    elif top is None:
        out = _posterior_rows(target, t, rng, log_prior.to(work), **options).exp() @ matrix
        out = out.reshape(*target.shape, width)
    else:
        ids, q, rest = noise_posterior(target, t, rng, log_prior.to(work), top=min(top, vocab), boost=boost, **options)
        out = posterior_embedding(ids, q, rest, matrix, log_prior)
    return out.to(weight.dtype)


def logit_interpolate(log_x0, log_x1, t, *, beta=0.01, log=False, out=None):
    """x_t = softmax((1 - t) log_x0 + t log_x1); an end point of weight 0 is not read, so it may be infinite there.

    Equivalent to, for t (rows,); integer log_x1 stand for c onehot(log_x1), c = log(V / beta - V + 1):
        result = ((1 - t)[:, None] * log_x0 + t[:, None] * log_x1).softmax(-1)
    """
    shape = log_x0.shape[:-1]
    work = torch.float64 if log_x0.dtype == torch.float64 else torch.float32
    t = _rows(t, shape, work, log_x0.device).reshape(*shape, 1)
    if not log_x1.is_floating_point():
        c = gap(log_x0.shape[-1], beta)
        log_x1 = torch.zeros_like(log_x0, dtype=work).scatter_(-1, log_x1.long().expand(shape)[..., None], c)
    start = torch.where(t == 1, 0.0, (1 - t) * log_x0.to(work))
    end = torch.where(t == 0, 0.0, t * log_x1.to(work))
    x = (start + end).log_softmax(-1) if log else (start + end).softmax(-1)
    x = x.to(log_x0.dtype if out is None else out.dtype)
    return x if out is None else out.copy_(x)


def loss_rows(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap, row_weight):
    """(loss rows, lse rows, divisor of the mean) in the working dtype."""
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    z = logits.to(work)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    high = z.detach().amax(-1, keepdim=True)
    high = torch.where(high.isfinite(), high, 0.0)
    below = z - high  # beside logits of 1e16 the logarithm of their number would be lost
    log_sum = below.logsumexp(-1, keepdim=True)
    lse = (log_sum + high)[..., 0]
    w = torch.ones(vocab, dtype=work, device=z.device) if weight is None else weight.to(work)
    rw = (
        torch.ones(shape, dtype=work, device=z.device)
        if row_weight is None
        else _rows(row_weight, shape, work, z.device).reshape(shape)
    )
    if target.is_floating_point():
        kept = torch.ones(shape, dtype=torch.bool, device=z.device)
        q, divisor = target.to(work), rw
    else:
        target = target.long().expand(shape)
        kept = target != ignore_index
        k = torch.where(kept, target, 0)
        q = torch.zeros_like(z).scatter_(-1, k[..., None], 1.0)
        divisor = torch.where(kept, w[k] * rw, 0.0)
    q = ((1 - label_smoothing) * q + label_smoothing / vocab) * w
    terms = q * (log_sum - below)
    if not target.is_floating_point():  # 0 * inf of a masked class; soft targets give NaN there, as torch does
        terms = torch.where(q == 0, 0.0, terms)
    loss = rw * (terms.sum(-1) + z_loss * lse**2)
    return torch.where(kept, loss, 0.0), lse, divisor.sum()


def cross_entropy(
    logits, target, *, weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, row_weight=None,
    reduction="mean", return_lse=False, inplace_backward=False,
):  # fmt: skip
    """loss = row_weight (sum_j q_j w_j (lse - z_j) + z_loss lse^2), z = softcap tanh(logits / softcap), lse = logsumexp z,
    q = (1 - label_smoothing) onehot(target) + label_smoothing / V, w the class weights; ignored rows are 0.

    Equivalent to, for logits (rows, V) and target (rows,), with reduction="none" and tensors for every option:
        z = softcap * (logits / softcap).tanh()
        rows = torch.nn.functional.cross_entropy(
            z, target, weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
        result = row_weight * (rows + (target != ignore_index) * z_loss * z.logsumexp(-1) ** 2)
    "sum" adds the rows; "mean" divides that by the sum of weight[target] * row_weight over the rows kept.
    """
    loss, lse, divisor = loss_rows(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap, row_weight)
    if reduction == "mean":
        loss = loss.sum() / divisor
    elif reduction == "sum":
        loss = loss.sum()
    return (loss, lse) if return_lse else loss


def cross_entropy_grad(
    logits, target, *, weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, row_weight=None,
    dloss=None, out=None,
):  # fmt: skip
    """(loss rows, lse, d (dloss * loss).sum() / d logits); dloss None is the upstream gradient of the mean.

    Equivalent to, with the options of `cross_entropy`:
        x = logits.clone().requires_grad_()
        loss, lse = cross_entropy(x, target, reduction="none", return_lse=True)
        result = loss, lse, torch.autograd.grad((dloss * loss).sum(), x)[0]
    """
    x = logits.detach().clone().requires_grad_()
    loss, lse, divisor = loss_rows(x, target, weight, ignore_index, label_smoothing, z_loss, softcap, row_weight)
    upstream = 1 / divisor if dloss is None else torch.as_tensor(dloss, dtype=loss.dtype, device=loss.device)
    (grad,) = torch.autograd.grad((loss * upstream).sum(), x)
    return loss.detach(), lse.detach(), grad if out is None else out.copy_(grad)


def linear_cross_entropy(
    hidden, weight, target, *, bias=None, class_weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0,
    softcap=None, row_weight=None, reduction="mean", return_lse=False, chunk_rows=None, logit_bytes=None,
):  # fmt: skip
    """The cross-entropy of logits = hidden @ weight.T + bias; the options are those of `cross_entropy`.

    Equivalent to, for hidden (rows, D), weight (V, D), bias (V,):
        result = cross_entropy(hidden @ weight.T + bias, target, weight=class_weight)
    """
    return cross_entropy(
        torch.nn.functional.linear(hidden, weight, bias), target, weight=class_weight, ignore_index=ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, row_weight=row_weight, reduction=reduction,
        return_lse=return_lse,
    )  # fmt: skip


def _draw(logits, k, rng, temperature, top_p, row_offset):
    """(token, log_prob) of flattened rows."""
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = logits.to(work)
    bad = z.isnan().any(-1) | ~z.max(-1).values.isfinite()
    z = torch.where(bad[:, None], 0.0, z)
    order = z.argsort(dim=-1, descending=True, stable=True)[:, :k]  # stable: ties to the lowest index
    temperature, top_p = (_rows(x, z.shape[:1], work, z.device) for x in (temperature, top_p))
    kept = z.gather(1, order) / temperature
    p = kept.softmax(-1)
    before = p.cumsum(-1) - p
    if (top_p < 1).any():
        first = torch.arange(k, device=z.device) == 0
        kept = torch.where((before < top_p) | (top_p == 1) | first, kept, -math.inf)
    log_p = kept.log_softmax(-1)
    rows, vocab = z.shape
    score = log_p - token_exponential(rows, vocab, rng, row_offset, work, z.device).gather(1, order).log()
    choice = log_p.argmax(-1) if k == 1 else score.argmax(-1)
    token = order.gather(1, choice[:, None])[:, 0]
    log_prob = log_p.gather(1, choice[:, None])[:, 0]
    return torch.where(bad, -1, token), torch.where(bad, math.nan, log_prob)


def topk_sample(logits, k, rng, *, temperature=1.0, top_p=1.0, row_offset=0):
    """token = argmax_j (logit_j / T - log E_j) over the kept candidates, a draw from their softmax (Gumbel-max).

    Kept: the k largest, ties to the lowest column, then of those the shortest prefix by probability with mass >= top_p.
    k = 1 is argmax. A row with a NaN, or whose maximum is not finite, gives (-1, NaN).

    Equivalent to, for logits (rows, V) and top_p = 1:
        order = logits.argsort(dim=-1, descending=True, stable=True)[:, :k]
        log_p = (logits.gather(1, order) / temperature).log_softmax(-1)
        score = log_p - token_exponential(*logits.shape, rng, row_offset).gather(1, order).log()
        choice = score.argmax(-1, keepdim=True)
        result = order.gather(1, choice)[:, 0], log_p.gather(1, choice)[:, 0]
    """
    rng = state_of(rng, logits.shape[:-1], row_offset)
    temperature, top_p = (torch.as_tensor(x).expand(logits.shape[:-1]).reshape(-1) for x in (temperature, top_p))
    token, log_prob = _draw(logits.reshape(-1, logits.shape[-1]), k, rng, temperature, top_p, row_offset)
    return token.reshape(logits.shape[:-1]), log_prob.reshape(logits.shape[:-1])


def topk_renoise(
    logits,
    k,
    t_next,
    rng,
    *,
    temperature=1.0,
    top_p=1.0,
    beta=0.01,
    given=None,
    known=None,
    row_offset=0,
    dtype=None,
    out=None,
):
    """(token, x_next): a draw, then fresh noise moved towards it; given rows keep known. A row with token -1 is NaN.

    Equivalent to, where nothing is given (one rng serves both: they are different streams):
        token, _ = topk_sample(logits, k, rng, temperature=temperature, row_offset=row_offset)
        x_next = noise_interpolate(
            token, t_next, rng, vocab_size=logits.shape[-1], beta=beta, row_offset=row_offset, dtype=logits.dtype)
        result = token, x_next
    """
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    rng = state_of(rng, shape, row_offset)
    token, _ = topk_sample(logits, k, rng, temperature=temperature, top_p=top_p, row_offset=row_offset)
    if given is not None:
        token = torch.where(given.expand(shape), known.long().expand(shape), token)
    x = noise_interpolate(
        token.clamp(min=0), t_next, rng, vocab_size=vocab, beta=beta, given=given, row_offset=row_offset,
        dtype=dtype or logits.dtype,
    )  # fmt: skip
    x = torch.where((token < 0)[..., None], math.nan, x)
    return token, x if out is None else out.copy_(x)


def euler_step(
    log_x, logits, rate, *, temperature=1.0, beta=0.01, given=None, known=None, dtype=None, inplace=False, out=None
):
    """(log softmax l, softmax l), l = (1 - rate) log_x + rate c softmax(logits / T): a step of dl/dtau = c p - l.

    Given rows are onehot(known), in log 0 and -inf. At rate 1 log_x is not read.

    Equivalent to, for rate (rows,), c = log(V / beta - V + 1):
        p = (logits / temperature).softmax(-1)
        l = (1 - rate)[:, None] * log_x + rate[:, None] * gap(logits.shape[-1], beta) * p
        result = l.log_softmax(-1), l.softmax(-1)
    """
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    work = torch.float64 if torch.float64 in (log_x.dtype, logits.dtype) else torch.float32
    rate = _rows(rate, shape, work, logits.device)
    p = (logits.to(work).reshape(-1, vocab) / _rows(temperature, shape, work, logits.device)).softmax(-1)
    state = torch.where(rate == 1, 0.0, (1 - rate) * log_x.to(work).reshape(-1, vocab))
    l = state + rate * gap(vocab, beta) * p
    log_next = _onehot_rows(l.log_softmax(-1), given, known, shape, log=True).reshape(logits.shape).to(log_x.dtype)
    x_next = _onehot_rows(l.softmax(-1), given, known, shape).reshape(logits.shape).to(dtype or logits.dtype)
    return (log_x.copy_(log_next) if inplace else log_next), x_next if out is None else out.copy_(x_next)


def softmax_expectation(logits, table, *, lowest=-32.0):
    """(sum_j p_j f(log p_j), lse), p = softmax(logits), f linear between table[i] at log p = lowest (1 - i / (N - 1)), below
    lowest table[0]. A row with a NaN or +inf is NaN; one of -inf alone has an lse of -inf.

    Equivalent to, for logits (rows, V) and table (N,):
        log_p = logits.log_softmax(-1)
        place = (1 - log_p.clamp(lowest, 0) / lowest) * (len(table) - 1)
        i = place.floor().clamp(max=len(table) - 2).long()
        f = torch.lerp(table[i], table[i + 1], place - i)
        result = (log_p.exp() * f).sum(-1), logits.logsumexp(-1)
    Row r of (T, N) tables has table[r // (rows / T)].
    """
    shape, vocab, knots = logits.shape[:-1], logits.shape[-1], table.shape[-1]
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z, tables = logits.to(work).reshape(-1, vocab), table.to(work).reshape(-1, knots)
    tables = tables.repeat_interleave(len(z) // max(len(tables), 1), 0)
    log_p = z.log_softmax(-1)
    place = (1 - log_p.clamp(lowest, 0) / lowest) * (knots - 1)
    i = place.nan_to_num(0).floor().clamp(max=knots - 2).long()
    f = torch.lerp(tables.gather(1, i), tables.gather(1, i + 1), place - i)
    lse = torch.where((z == math.inf).any(-1), math.nan, z.logsumexp(-1))
    return (log_p.exp() * f).sum(-1).reshape(shape), lse.reshape(shape)
