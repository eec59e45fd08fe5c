"""Text-aware attention pooling from Gram matrices, exact in scores and gradients, without a vector [D] for each pair.

docs/math/text_aware_pooling.md derives all formulas; names here are the symbols there.

Shape suffixes: i texts, j clips, f (and g) frames, k width of the keys, K of the values, D width, m quadratic forms.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from atr_scale.products import HeadProducts, add_product, product
from atr_scale.scorers.pooled_cosine import FormGradients, Forms, cosines, gradients
from atr_scale.scorers.scorer import exact_products
from atr_scale.scorers.tiles import Tensors, pair_tiles

BEHIND = 4  # columns of a table behind the Gram matrices: three linear forms, and ones
LINEAR = 8  # columns of `PoolingMetrics.forms` behind the metrics: products of a width that 8 divides are faster


class PoolingMetrics(NamedTuple):
    """Products of the parameters behind the attention. `matching` and `offsets` multiply captions' embeddings."""

    matching: Tensor  # [K, D]
    offsets: Tensor  # [2, D]
    forms: Tensor  # [K, m K + LINEAR]: metrics M and, for linear forms, three columns and zeros
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
        a = _centred(scaled + product(scaled, weight.T))
        u = _centred(inner_shift + (weight @ inner_shift + bias))
    scaled_a, scaled_u = a * scale, u * scale
    quadratic = [product(a, a.T), product(scaled_a, scaled_a.T), *([product(out, out.T)] if block else [])]
    linear = torch.stack([scaled_a @ shift, a @ u, scaled_a @ scaled_u], 1)
    constants = torch.stack([u @ u, scaled_u @ scaled_u, scaled_u @ shift, shift @ shift])
    forms = torch.cat([*quadratic, pad(linear, (0, LINEAR - 3))], 1)
    return PoolingMetrics(scaled_a, torch.stack([scaled_u, shift]), forms, constants)


class Tables(torch.autograd.Function):
    """[j, f, m f + 4] of clips with values X [j, f, K]: Gram matrices X M X', three linear forms X l, and ones.

    forms: see PoolingMetrics. Products are always fp32: forms of Gram matrices may cancel.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, forms: Tensor) -> Tensor:
        j, f, K = value.shape
        mapped, linear = product(value, forms).split([forms.shape[1] - LINEAR, LINEAR], -1)
        mapped = mapped.reshape(j, -1, K)  # [j, f m, K]
        ctx.save_for_backward(value, forms, mapped)
        table = torch.cat([product(mapped, value.mT).view(j, f, -1), linear[..., :BEHIND]], -1)
        table[..., -1] = 1
        return table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        value, forms, mapped = ctx.saved_tensors
        by_grams, by_linear = grads[0][..., :-BEHIND], pad(grads[0][..., -BEHIND:-1], (0, LINEAR - 3))
        by_grams = by_grams.reshape(len(value), -1, value.shape[1])  # [j, f m, f]: sums of w w', hence symmetric
        by_mapped = product(by_grams, value).view(*value.shape[:2], -1)
        by_forms = product(value.flatten(0, 1).T, torch.cat([by_mapped, by_linear], -1).flatten(0, 1))
        by_value = 2 * product(by_grams.mT, mapped) + product(by_linear, forms[:, -LINEAR:].T)
        return by_value, by_forms


class GramScores(torch.autograd.Function):
    """Scores [i, j] of all pairs, in tiles, with the gradients of docs/math/text_aware_pooling.md.

    asked, matched, offsets: [i, k], [i, K], [i, 2], captions as they meet the keys, the values and the last shift.
    key, value, table: [j, f, k], [j, f, K] and `Tables`. constants: of PoolingMetrics. dim: D.
    kind: precision of the products of width k and K. Gram matrices, whose forms may cancel, always multiply in fp32.
    kept_bytes: of the tiles that are kept for the backward pass; the others are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        asked: Tensor,
        matched: Tensor,
        offsets: Tensor,
        key: Tensor,
        value: Tensor,
        table: Tensor,
        constants: Tensor,
        dim: int,
        kind: HeadProducts,
        kept_bytes: int,
    ) -> Tensor:
        ctx.save_for_backward(asked, matched, offsets, key, value, table, constants)
        ctx.dim, ctx.kind, ctx.kept = dim, kind, {}
        ctx.tiles = pair_tiles(len(asked), len(key), key.shape[1], asked)
        left = kept_bytes if any(ctx.needs_input_grad) else 0
        scores = asked.new_empty(len(asked), len(key))
        with exact_products(asked):
            for number, (texts, clips) in enumerate(ctx.tiles):
                tile = _Tile.of(asked[texts], matched[texts], key[clips], value[clips], table[clips], kind)
                scores[texts, clips] = cosines(dim, tile.forms, offsets[texts], constants)
                left -= tile.bytes
                if left >= 0:
                    ctx.kept[number] = tile
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        asked, matched, offsets, key, value, table, constants = ctx.saved_tensors
        by_asked, by_matched, by_offsets, by_key, by_value, by_table, by_constants = found = tuple(
            torch.zeros_like(x) for x in ctx.saved_tensors
        )
        # The rows that multiply the scaled weights; see _Tile.gradients.
        rows = torch.cat([2 * table[..., :-BEHIND], table[..., -BEHIND:]], -1).mT
        with exact_products(asked):
            for number, (texts, clips) in enumerate(ctx.tiles):
                tile = ctx.kept.pop(number, None)
                if tile is None:
                    tile = _Tile.of(asked[texts], matched[texts], key[clips], value[clips], table[clips], ctx.kind)
                by_scores = grads[0][texts, clips]
                by_forms, by_these_offsets, by_these_constants = gradients(
                    ctx.dim, tile.forms, offsets[texts], constants, by_scores
                )
                by_offsets[texts] += by_these_offsets
                by_constants += by_these_constants
                by_logits, by_found = tile.gradients(by_forms, rows[clips], by_table[clips])
                for by_product, texts_, frames, by_texts, by_frames in (
                    (by_logits, asked, key, by_asked, by_key),
                    (by_found, matched, value, by_matched, by_value),
                ):
                    flat = by_product.flatten(1)
                    add_product(by_frames[clips].flatten(0, 1), flat.T, texts_[texts], ctx.kind)
                    add_product(by_texts[texts], flat, frames[clips].flatten(0, 1), ctx.kind)
        return *found, None, None, None


class _Tile(NamedTuple):
    """Some captions against some clips."""

    weight: Tensor  # w [i, j, f]
    found: Tensor  # X n [i, j, f]
    forms: Forms

    @staticmethod
    def of(asked: Tensor, matched: Tensor, key: Tensor, value: Tensor, table: Tensor, kind: HeadProducts) -> _Tile:
        shape = (len(asked), *key.shape[:2])
        weight = product(asked, key.flatten(0, 1).T, kind).view(shape).softmax(-1)
        found = product(matched, value.flatten(0, 1).T, kind).view(shape)
        along = weight.new_empty(*shape[:2], table.shape[2])  # G w, w . l and the sum of w
        torch.bmm(weight.transpose(0, 1), table, out=along.transpose(0, 1))
        linear = along[..., -BEHIND:-1].movedim(-1, 0).contiguous()
        quadratic = _by_metric(along, weight).mul_(weight.unsqueeze(2)).sum(-1).movedim(-1, 0).contiguous()
        used = linear if len(quadratic) > 2 else linear[:1]  # the others are 0 without a residual block
        return _Tile(weight, found, Forms((found * weight).sum(-1), quadratic.unbind(), used.unbind()))

    @property
    def bytes(self) -> int:
        pairs = 1 + len(self.forms.quadratic) + len(self.forms.linear)
        return (2 * self.weight.numel() + pairs * self.forms.dot.numel()) * self.weight.element_size()

    def gradients(self, by: FormGradients, rows: Tensor, by_table: Tensor) -> Tensors:
        """Gradients [i, j, f] of the attention's logits and of `found`; adds that of the table to `by_table`.

        rows: [j, m f + 4, f], 2 G, the linear forms and ones. They multiply V = [rho w, rho, -mean] to
        (d loss / d w - its mean) / c - X n. The tile's own tensors are overwritten.
        """
        weight, found, forms = self
        scaled = weight.new_empty(*weight.shape[:2], rows.shape[1])
        factors = torch.stack(by.quadratic, -1).unsqueeze(-1)
        torch.mul(weight.unsqueeze(2), factors, out=_by_metric(scaled, weight))
        scaled[..., -BEHIND:-1].zero_()
        for place, rho in enumerate(by.linear):
            scaled[..., place - BEHIND] = rho
        scaled[..., -1] = -by.mean(forms)
        by_weight = found.transpose(0, 1).baddbmm_(scaled.transpose(0, 1), rows).transpose(0, 1)
        by_found = weight.mul_(by.c.unsqueeze(-1))
        by_table.baddbmm_(by_found.permute(1, 2, 0), scaled.transpose(0, 1))
        return by_weight.mul_(by_found), by_found


def _by_metric(along: Tensor, weight: Tensor) -> Tensor:
    """View [i, j, m, f] of the Gram matrices' part of a tensor [i, j, m f + 4]."""
    view: Tensor = along[..., :-BEHIND].unflatten(-1, (-1, weight.shape[-1]))
    return view


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(-1, keepdim=True)
