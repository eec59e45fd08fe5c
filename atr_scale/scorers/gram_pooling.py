"""Text-aware attention pooling from Gram matrices, exact in scores and gradients, without a vector [D] for each pair.

Shape suffixes: i texts, j clips, f (and g) frames, D width, k width of the keys, K of the values, m metrics.

After the attention, everything is affine in its weights w, up to the factors of LayerNorm. So, with the clip's values
X [f, K], the variances and the length of the pooled vector are quadratic forms w (X M X') w. A metric M [K, K] depends
on the parameters alone, a Gram matrix X M X' [f, g] on one clip. The product with the caption's embedding is w . X n,
and n [K] depends on the caption alone.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from atr_scale.score_block import at_least_fp32, slices
from atr_scale.scorers.scorer import without_autocast
from atr_scale.scorers.tiles import Tensors

EPS = 1e-5  # inside every LayerNorm
SHORTEST = 1e-12  # lower bound of a vector's length, as in torch.nn.functional.normalize
Statistics = tuple[Tensor, Tensor, Tensor]  # a product, quadratic forms and linear forms: [j, i], [j, m, i], [j, 3, i]
FORMS = 3  # linear forms of w, besides the quadratic ones


class PoolingMetrics(NamedTuple):
    """Products of the parameters behind the attention. `matching` and `offsets` multiply captions' embeddings."""

    matching: Tensor  # [K, D]
    offsets: Tensor  # [2, D]
    quadratic: Tensor  # [K, m K]: the metrics side by side
    linear: Tensor  # [3, K]
    constants: Tensor  # [4]


def metrics_of(out: Tensor, scale: Tensor, shift: Tensor, *block: Tensor) -> PoolingMetrics:
    """Metrics from the parameters behind the attention.

    out: W_O [K, D]. scale, shift: [D] of the last LayerNorm. block: of a residual block the scale and shift [D] of its
    LayerNorm and the weight and bias of its Linear.

    The centred input of the last LayerNorm is r (w X) a + u, with a factor r for each pair. Without a block r = 1 and
    u = 0.
    """
    a = out = _centred(out)
    u = torch.zeros_like(shift)
    if block:
        inner_scale, inner_shift, weight, bias = block
        scaled = out * inner_scale
        a = _centred(scaled + linear(scaled, weight))
        u = _centred(inner_shift + linear(inner_shift, weight, bias))
    scaled_a, scaled_u = a * scale, u * scale
    quadratic = [a @ a.T, scaled_a @ scaled_a.T] + ([out @ out.T] if block else [])
    forms = torch.stack([a @ u, scaled_a @ scaled_u, scaled_a @ shift])
    constants = torch.stack([u @ u, scaled_u @ scaled_u, scaled_u @ shift, shift @ shift])
    return PoolingMetrics(scaled_a, torch.stack([scaled_u, shift]), torch.cat(quadratic, 1), forms, constants)


class GramScores(torch.autograd.Function):
    """Scores [i, j] of all pairs, in tiles of tile_size = (texts, clips), with gradients by formulas.

    query, matched, offsets: [i, k], [i, K], [i, 2], captions projected for the attention, the values, the last shift.
    tokens, mask: frames [j, f, D] of any floating dtype, normalised here to mean 0 and variance 1, and [j, f].
    projection, bias: [k + K, D] and [k + K], of keys and then values, for normalised frames.
    quadratic, forms, constants: of PoolingMetrics. dim: D.

    Keys, values and Gram matrices are kept for the backward pass; normalised frames and tiles are computed again. With
    `few` texts tiles are kept and there are no keys: `projection` and `bias` are those of the values,
    `query` [i, D] has been multiplied by the keys' projection, and frames are their own keys.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        matched: Tensor,
        offsets: Tensor,
        tokens: Tensor,
        mask: Tensor,
        projection: Tensor,
        bias: Tensor,
        quadratic: Tensor,
        forms: Tensor,
        constants: Tensor,
        dim: int,
        tile_size: tuple[int, int],
        few: bool,
    ) -> Tensor:
        scores, kept = query.new_empty(len(query), len(tokens)), []
        for clips in slices(0, len(tokens), tile_size[1]):
            frames, _, _ = _normalised(at_least_fp32(tokens[clips]))
            projected = linear(frames, projection, bias)
            key, value = _key_and_value(frames, projected, query.shape[1], few)
            mapped = (value.flatten(0, 1) @ quadratic).view(len(value), -1, value.shape[2])  # [j, f m, K]
            table = torch.cat([mapped @ value.mT, (value @ forms.T).mT], 1)  # [j, f m + 3, g]
            kept += [projected, table, *([mapped] if few else [])]
            for texts in slices(0, len(query), tile_size[0]):
                tile = _Tile.of(query[texts], matched[texts], key, value, mask[clips], table)
                kept += tile if few else []
                scores[texts, clips] = _cosines(dim, *tile.statistics, offsets[texts], constants).T
        ctx.save_for_backward(query, matched, offsets, tokens, mask, projection, quadratic, forms, constants, *kept)
        ctx.dim, ctx.tile_size, ctx.few = dim, tile_size, few
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, matched, offsets, tokens, mask, projection, quadratic, forms, constants, *kept = ctx.saved_tensors
        by_scores, rest, few = grads[0], iter(kept), ctx.few
        by_query, by_matched, by_offsets, by_projection, by_bias, by_quadratic, by_forms, by_constants = (
            torch.zeros_like(x)
            for x in (query, matched, offsets, projection, projection[:, 0], quadratic, forms, constants)
        )
        by_tokens = torch.empty_like(tokens)
        with without_autocast(tokens):
            for clips in slices(0, len(tokens), ctx.tile_size[1]):
                frames, mean, scale = _normalised(wide := at_least_fp32(tokens[clips]))
                projected, table = next(rest), next(rest)
                by_frames, by_projected, by_table = (torch.zeros_like(x) for x in (frames, projected, table))
                key, value = _key_and_value(frames, projected, query.shape[1], few)
                by_key, by_value = _key_and_value(by_frames, by_projected, query.shape[1], few)
                mapped = next(rest) if few else None
                for texts in slices(0, len(query), ctx.tile_size[0]):
                    if few:
                        tile = _Tile(*islice(rest, len(_Tile._fields)))
                    else:
                        tile = _Tile.of(query[texts], matched[texts], key, value, mask[clips], table)
                    by_statistics, (by_these_offsets, by_these_constants) = _cosine_gradients(
                        ctx.dim, tile.statistics, (offsets[texts], constants), by_scores[texts, clips].T
                    )
                    by_offsets[texts] += by_these_offsets
                    by_constants += by_these_constants
                    by_logits, by_found, by_along = tile.gradients(table, by_statistics)
                    by_table.baddbmm_(by_along, tile.weight.mT)
                    _add_factor_gradients(by_logits, key, query[texts], by_key, by_query[texts])
                    _add_factor_gradients(by_found, value, matched[texts], by_value, by_matched[texts])
                # The gradient of a Gram matrix is a sum of w w' over pairs, hence symmetric.
                by_grams, by_form_rows = by_table[:, :-FORMS], by_table[:, -FORMS:].mT.flatten(0, 1)
                values, by_values = value.flatten(0, 1), by_value.flatten(0, 1)
                by_mapped = (by_grams @ value).view(len(values), -1)  # [j f, m K]
                by_quadratic.addmm_(values.T, by_mapped)
                if mapped is None:
                    by_values.addmm_(by_mapped, quadratic.T, alpha=2)
                else:
                    by_value.baddbmm_(by_grams.mT, mapped, alpha=2)
                by_values.addmm_(by_form_rows, forms)
                by_forms.addmm_(by_form_rows.T, values)
                by_rows = by_projected.flatten(0, 1)
                by_projection.addmm_(by_rows.T, frames.flatten(0, 1))
                by_bias += by_rows.sum(0)
                by_frames.flatten(0, 1).addmm_(by_rows, projection)
                by_tokens[clips] = torch.ops.aten.native_layer_norm_backward(
                    by_frames, wide, wide.shape[2:], mean, scale, None, None, [True, False, False]
                )[0]
        by_texts, by_weights = (by_query, by_matched, by_offsets), (by_projection, by_bias)
        return *by_texts, by_tokens, None, *by_weights, by_quadratic, by_forms, by_constants, None, None, None


class _Tile(NamedTuple):
    """Some captions against some clips."""

    weight: Tensor  # [j, f, i]
    found: Tensor  # [j, f, i]: X n
    along: Tensor  # [j, f m + 3, i]: Gram matrices and forms, times weights
    dot: Tensor  # [j, i]: w . X n
    quadratic: Tensor  # [j, m, i]

    @staticmethod
    def of(query: Tensor, matched: Tensor, key: Tensor, value: Tensor, mask: Tensor, table: Tensor) -> _Tile:
        weight, found = attention(query, key, mask), products(value, matched)
        along = table @ weight
        quadratic = (_by_metric(along, weight) * weight.unsqueeze(2)).sum(1)
        return _Tile(weight, found, along, (found * weight).sum(1), quadratic)

    @property
    def statistics(self) -> Statistics:
        return self.dot, self.quadratic, self.along[:, -FORMS:]

    def gradients(self, table: Tensor, by_statistics: Statistics) -> Tensors:
        """Gradients of the attention's logits [j, f, i] and of `found`; the factor of `weight` in that of `table`."""
        weight, (by_dot, by_quadratic, by_forms) = self.weight, by_statistics
        mean = by_dot * self.dot + 2 * (by_quadratic * self.quadratic).sum(1) + (by_forms * self.statistics[2]).sum(1)
        by_weight = self.found * by_dot.unsqueeze(1)
        for along, by_values in zip(_by_metric(self.along, weight).unbind(2), by_quadratic.unbind(1), strict=True):
            by_weight.addcmul_(along, by_values.unsqueeze(1), value=2)
        by_weight.baddbmm_(table[:, -FORMS:].mT, by_forms)
        by_logits = by_weight.sub_(mean.unsqueeze(1)).mul_(weight)  # `mean`: of by_weight under the weights
        by_along = torch.empty_like(self.along)
        torch.mul(weight.unsqueeze(2), by_quadratic.unsqueeze(1), out=_by_metric(by_along, weight))
        by_along[:, -FORMS:] = by_forms
        return by_logits, weight * by_dot.unsqueeze(1), by_along


def attention(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Weights [j, f, i] over real frames. Texts come last, so that sums over frames read memory in order."""
    lowest = torch.finfo(query.dtype).min  # -inf would give NaN for a clip without frames
    logits = products(key, query).masked_fill_(~mask.unsqueeze(-1), lowest)
    return logits.softmax(1)


def products(frames: Tensor, texts: Tensor) -> Tensor:
    """[j, f, K] and [i, K] -> [j, f, i], as one matrix product."""
    product: Tensor = (frames.flatten(0, 1) @ texts.T).unflatten(0, frames.shape[:2])
    return product


def _add_factor_gradients(grad: Tensor, frames: Tensor, texts: Tensor, by_frames: Tensor, by_texts: Tensor) -> None:
    """Add the gradients of the factors of `products` that follow from its gradient [j, f, i]."""
    rows = grad.flatten(0, 1)
    by_frames.flatten(0, 1).addmm_(rows, texts)
    by_texts.addmm_(rows.T, frames.flatten(0, 1))


def _by_metric(along: Tensor, weight: Tensor) -> Tensor:
    """View [j, f, m, i] of the Gram matrices' part of `along`."""
    view: Tensor = along[:, :-FORMS].unflatten(1, (weight.shape[1], -1))
    return view


def _cosines(dim: int, dot: Tensor, quadratic: Tensor, forms: Tensor, offsets: Tensor, constants: Tensor) -> Tensor:
    """Scores [j, i], with the EPS of every LayerNorm."""
    spread, length, *inner = quadratic.unbind(1)
    along_u, along_scaled_u, along_shift = forms.unbind(1)
    uu, scaled_uu, u_shift, shift_shift = constants
    r = (inner[0] / dim + EPS).rsqrt() if inner else 1.0
    r_last = ((r * r * spread + 2 * r * along_u + uu) / dim + EPS).rsqrt()
    dot = r_last * (r * dot + offsets[:, 0]) + offsets[:, 1]
    squared = r_last.square() * (r * r * length + 2 * r * along_scaled_u + scaled_uu)
    squared = squared + 2 * r_last * (r * along_shift + u_shift) + shift_shift
    cosines: Tensor = dot * squared.clamp(min=SHORTEST**2).rsqrt()
    return cosines


def _cosine_gradients(
    dim: int, statistics: Statistics, of_texts: Tensors, by_scores: Tensor
) -> tuple[Statistics, Tensors]:
    """Gradients of the arguments of `_cosines`, by autograd; its cost is small, as a tile is f times larger."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (*statistics, *of_texts)]
        by_dot, by_quadratic, by_forms, *by_texts = torch.autograd.grad(_cosines(dim, *leaves), leaves, by_scores)
    return (by_dot, by_quadratic, by_forms), tuple(by_texts)


def keys_and_values(projected: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Views [j, f, width] and [j, f, K] of projected frames, or of their gradient."""
    return projected[..., :width], projected[..., width:]


def _key_and_value(frames: Tensor, projected: Tensor, width: int, few: bool) -> tuple[Tensor, Tensor]:
    """Keys and values, or their gradients; see `GramScores` for `few`."""
    return (frames, projected) if few else keys_and_values(projected, width)


def _normalised(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm without its parameters, the means, and one over the deviations."""
    return torch.native_layer_norm(tokens, tokens.shape[2:], None, None, EPS)


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(-1, keepdim=True)
