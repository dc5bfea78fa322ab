"""The kernel: addressing, writing and reading as one compiled operation with a gradient worked out by hand.

`access.py` says the same in torch operations, and is what is exported and what runs on a GPU. On a CPU torch spends
most of a training step on starting some two hundred small operations, forward and backward; here they are two
loops, compiled by numba when first called, with a sequence's memory in the processor's cache. A test holds the two
together, values and gradients.

It is compiled for float32 and for float64, each when it is first called; all its arguments have one of them.

Shapes: B batch, H heads (R read heads, then W write heads), N memory rows, M row width, S shift positions,
P numbers that the heads ask for.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from training.model.access import Accessed
from training.model.addressing import (
    GREATEST_KEY_NORM,
    GREATEST_SQUARED_NORM,
    LEAST_ATTENTION,
    LEAST_KEY_NORM,
    LEAST_SQUARED_NORM,
)
from training.model.heads import HeadSizes

_LEAST_ATTENTION = np.float32(LEAST_ATTENTION)
_LEAST_SQUARED_NORM = np.float32(LEAST_SQUARED_NORM)
_GREATEST_SQUARED_NORM = np.float32(GREATEST_SQUARED_NORM)
_LEAST_KEY_NORM, _GREATEST_KEY_NORM = np.float32(LEAST_KEY_NORM), np.float32(GREATEST_KEY_NORM)
_ZERO, _ONE = np.float32(0), np.float32(1)

# Sums may be reordered, so that loops become vector instructions; NaN and infinity keep their meaning, since
# training must see them. A loop that sums never stores as well: whether such a loop becomes vector instructions
# depends on where its arrays happen to lie, and the order of its sum, so its last bit, would.
_FAST = {"reassoc", "contract", "arcp", "nsz"}
compiled = numba.njit(fastmath=_FAST, cache=True, nogil=True, error_model="numpy")


def compiled_access(requested: Tensor, memory: Tensor, previous: Tensor, sizes: HeadSizes) -> Accessed:
    """What `access.access_memory` does, on a CPU, with a gradient."""
    return Accessed(*_CompiledAccess.apply(requested, memory, previous, sizes))  # type: ignore[no-untyped-call]


class _CompiledAccess(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, requested: Tensor, memory: Tensor, previous: Tensor, sizes: HeadSizes
    ) -> tuple[Tensor, Tensor, Tensor]:
        requested, memory, previous = requested.contiguous(), memory.contiguous(), previous.contiguous()
        (batch, heads, rows), width = previous.shape, memory.shape[1]
        read_vectors = memory.new_empty(batch, sizes.num_read_heads, width)
        weightings, next_memory = torch.empty_like(previous), torch.empty_like(memory)
        kept = memory.new_empty(batch, 3, heads, rows)
        access_memory_forward(
            requested.detach().numpy(),
            memory.detach().numpy(),
            previous.detach().numpy(),
            sizes.num_read_heads,
            sizes.num_shifts,
            weightings.numpy(),
            next_memory.numpy(),
            read_vectors.numpy(),
            kept.numpy(),
        )
        ctx.save_for_backward(requested, memory, previous, weightings, next_memory, kept)
        ctx.sizes = sizes
        return weightings, next_memory, read_vectors

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_weightings: Tensor, grad_next_memory: Tensor, grad_read_vectors: Tensor
    ) -> tuple[Tensor | None, ...]:
        requested, memory, previous, weightings, next_memory, kept = ctx.saved_tensors
        grad_requested = torch.empty_like(requested)
        grad_memory, grad_previous = torch.empty_like(memory), torch.empty_like(previous)
        access_memory_backward(
            requested.detach().numpy(),
            memory.detach().numpy(),
            previous.detach().numpy(),
            ctx.sizes.num_read_heads,
            ctx.sizes.num_shifts,
            weightings.detach().numpy(),
            next_memory.detach().numpy(),
            kept.numpy(),
            grad_weightings.contiguous().numpy(),
            grad_next_memory.contiguous().numpy(),
            grad_read_vectors.contiguous().numpy(),
            grad_requested.numpy(),
            grad_memory.numpy(),
            grad_previous.numpy(),
        )
        return grad_requested, grad_memory, grad_previous, None


@compiled
def access_memory_forward(  # type: ignore[no-untyped-def]
    requested, memory, previous, num_reads, num_shifts, weightings, next_memory, read_vectors, kept
):
    """Fill what comes out; `kept` [B, 3, H, N] holds likeness, attention by content and shifted attention."""
    num_batch, num_heads, num_rows = previous.shape
    width = memory.shape[1]
    num_writes = num_heads - num_reads
    reach = num_shifts // 2
    per_head = width + num_shifts + 3
    scores = np.empty(num_rows, memory.dtype)
    inverse_norms = np.empty(num_rows, memory.dtype)
    gated = np.empty(num_rows, memory.dtype)
    for b in range(num_batch):
        scores[:] = _ZERO
        for m in range(width):
            for n in range(num_rows):
                scores[n] += memory[b, m, n] * memory[b, m, n]
        for n in range(num_rows):
            inverse_norms[n] = _inverse_norm(scores[n])

        for h in range(num_heads):
            asked = requested[b, h * per_head : (h + 1) * per_head]
            shifting, strength, sharpness, gate = _activate(asked, width, num_shifts)
            likeness, content, shifted = kept[b, 0, h], kept[b, 1, h], kept[b, 2, h]

            inverse_key = _inverse_length(asked[:width])
            likeness[:] = _ZERO
            for m in range(width):
                key = asked[m] * inverse_key
                for n in range(num_rows):
                    likeness[n] += key * memory[b, m, n]
            for n in range(num_rows):
                likeness[n] *= inverse_norms[n]
                scores[n] = strength * likeness[n]
            _softmax(scores, content)

            for n in range(num_rows):
                gated[n] = previous[b, h, n] + gate * (content[n] - previous[b, h, n])
            shifted[:] = _ZERO
            for i in range(num_shifts):
                _add_rotated(gated, reach - i, shifting[i], shifted)

            _log(shifted, scores)
            for n in range(num_rows):
                scores[n] *= sharpness
            _softmax(scores, weightings[b, h])

        writing = requested[b, num_heads * per_head :]
        for m in range(width):
            for n in range(num_rows):
                next_memory[b, m, n] = memory[b, m, n]
            for w in range(num_writes):
                erase = _sigmoid(writing[m * num_writes + w])
                for n in range(num_rows):
                    next_memory[b, m, n] *= _ONE - erase * weightings[b, num_reads + w, n]
            for w in range(num_writes):
                add = writing[(width + m) * num_writes + w]
                for n in range(num_rows):
                    next_memory[b, m, n] += add * weightings[b, num_reads + w, n]
            for r in range(num_reads):
                total = _ZERO
                for n in range(num_rows):
                    total += weightings[b, r, n] * next_memory[b, m, n]
                read_vectors[b, r, m] = total


@compiled
def access_memory_backward(  # type: ignore[no-untyped-def]
    requested,
    memory,
    previous,
    num_reads,
    num_shifts,
    weightings,
    next_memory,
    kept,
    grad_weightings,
    grad_next_memory,
    grad_read_vectors,
    grad_requested,
    grad_memory,
    grad_previous,
):
    """Fill the gradients of what went in, from those of what came out: `access_memory_forward` undone line by line."""
    num_batch, num_heads, num_rows = previous.shape
    width = memory.shape[1]
    num_writes = num_heads - num_reads
    reach = num_shifts // 2
    per_head = width + num_shifts + 3
    grad_attention = np.empty((num_heads, num_rows), memory.dtype)
    grad_next = np.empty(num_rows, memory.dtype)
    others = np.empty(num_rows, memory.dtype)
    gated = np.empty(num_rows, memory.dtype)
    grad_gated = np.empty(num_rows, memory.dtype)
    grad_shifted = np.empty(num_rows, memory.dtype)
    grad_likeness = np.empty(num_rows, memory.dtype)
    grad_inverse_norms = np.empty(num_rows, memory.dtype)
    inverse_norms = np.empty(num_rows, memory.dtype)
    logs = np.empty(num_rows, memory.dtype)
    grad_shifting = np.empty(num_shifts, memory.dtype)
    grad_key = np.empty(width, memory.dtype)
    for b in range(num_batch):
        grad_attention[:] = grad_weightings[b]
        writing = requested[b, num_heads * per_head :]
        grad_writing = grad_requested[b, num_heads * per_head :]
        inverse_norms[:] = _ZERO
        for m in range(width):
            # Reading.
            for n in range(num_rows):
                grad_next[n] = grad_next_memory[b, m, n]
                inverse_norms[n] += memory[b, m, n] * memory[b, m, n]
            for r in range(num_reads):
                grad_read = grad_read_vectors[b, r, m]
                for n in range(num_rows):
                    grad_next[n] += grad_read * weightings[b, r, n]
                    grad_attention[r, n] += grad_read * next_memory[b, m, n]
            # Writing: the product over the heads, and for each head's part the product over the others.
            for n in range(num_rows):
                grad_memory[b, m, n] = grad_next[n]
            for w in range(num_writes):
                erase = _sigmoid(writing[m * num_writes + w])
                add = writing[(width + m) * num_writes + w]
                for n in range(num_rows):
                    others[n] = grad_next[n] * memory[b, m, n]
                    grad_memory[b, m, n] *= _ONE - erase * weightings[b, num_reads + w, n]
                for v in range(num_writes):
                    if v != w:
                        erased = _sigmoid(writing[m * num_writes + v])
                        for n in range(num_rows):
                            others[n] *= _ONE - erased * weightings[b, num_reads + v, n]
                grad_erase, grad_add = _ZERO, _ZERO
                for n in range(num_rows):
                    grad_erase -= others[n] * weightings[b, num_reads + w, n]
                    grad_add += grad_next[n] * weightings[b, num_reads + w, n]
                for n in range(num_rows):
                    grad_attention[num_reads + w, n] += add * grad_next[n] - erase * others[n]
                grad_writing[m * num_writes + w] = grad_erase * erase * (_ONE - erase)
                grad_writing[(width + m) * num_writes + w] = grad_add

        for n in range(num_rows):
            inverse_norms[n] = _inverse_norm(inverse_norms[n])
        grad_inverse_norms[:] = _ZERO
        for h in range(num_heads):
            asked = requested[b, h * per_head : (h + 1) * per_head]
            grad_asked = grad_requested[b, h * per_head : (h + 1) * per_head]
            shifting, strength, sharpness, gate = _activate(asked, width, num_shifts)
            likeness, content, shifted = kept[b, 0, h], kept[b, 1, h], kept[b, 2, h]

            # Sharpening.
            mean = _ZERO
            for n in range(num_rows):
                mean += grad_attention[h, n] * weightings[b, h, n]
            _log(shifted, logs)
            grad_sharpness = _ZERO
            for n in range(num_rows):
                grad_sharpness += weightings[b, h, n] * (grad_attention[h, n] - mean) * logs[n]
            for n in range(num_rows):
                grad_power = weightings[b, h, n] * (grad_attention[h, n] - mean)
                is_kept = _ONE if shifted[n] > _LEAST_ATTENTION else _ZERO
                grad_shifted[n] = is_kept * sharpness * grad_power / max(shifted[n], _LEAST_ATTENTION)

            # Shifting.
            for n in range(num_rows):
                gated[n] = previous[b, h, n] + gate * (content[n] - previous[b, h, n])
            grad_gated[:] = _ZERO
            mean = _ZERO
            for i in range(num_shifts):
                _add_rotated(grad_shifted, i - reach, shifting[i], grad_gated)
                grad_shifting[i] = _rotated_product(grad_shifted, gated, reach - i)
                mean += grad_shifting[i] * shifting[i]
            for i in range(num_shifts):
                grad_asked[width + i] = shifting[i] * (grad_shifting[i] - mean)

            # Interpolating.
            grad_gate, mean = _ZERO, _ZERO
            for n in range(num_rows):
                grad_gate += grad_gated[n] * (content[n] - previous[b, h, n])
                mean += gate * grad_gated[n] * content[n]
            for n in range(num_rows):
                grad_previous[b, h, n] = (_ONE - gate) * grad_gated[n]

            # Looking by content.
            grad_strength = _ZERO
            for n in range(num_rows):
                grad_strength += content[n] * (gate * grad_gated[n] - mean) * likeness[n]
            for n in range(num_rows):
                grad_score = content[n] * (gate * grad_gated[n] - mean)
                grad_inverse_norms[n] += strength * grad_score * likeness[n]  # Times the norm; see below.
                grad_likeness[n] = strength * grad_score * inverse_norms[n]
            inverse_key = _inverse_length(asked[:width])
            along = _ZERO
            for m in range(width):
                key = asked[m] * inverse_key
                total = _ZERO
                for n in range(num_rows):
                    total += grad_likeness[n] * memory[b, m, n]
                for n in range(num_rows):
                    grad_memory[b, m, n] += key * grad_likeness[n]
                grad_key[m] = total
                along += total * key
            if not is_differentiable_norm(inverse_key):
                along = _ZERO
            for m in range(width):
                grad_asked[m] = (grad_key[m] - along * asked[m] * inverse_key) * inverse_key

            at = width + num_shifts
            grad_asked[at] = grad_strength * _sigmoid(asked[at])
            grad_asked[at + 1] = grad_sharpness * _sigmoid(asked[at + 1])
            grad_asked[at + 2] = grad_gate * gate * (_ONE - gate)

        # The norms: likeness is a product over the norm, so its share of their gradient is minus itself over it.
        least = _inverse_norm(memory.dtype.type(_GREATEST_SQUARED_NORM))
        greatest = _inverse_norm(memory.dtype.type(_LEAST_SQUARED_NORM))
        for n in range(num_rows):
            is_kept = _ONE if least < inverse_norms[n] < greatest else _ZERO
            grad_inverse_norms[n] *= is_kept * inverse_norms[n] * inverse_norms[n]
        for m in range(width):
            for n in range(num_rows):
                grad_memory[b, m, n] -= grad_inverse_norms[n] * memory[b, m, n]


@compiled
def _activate(asked, width, num_shifts):  # type: ignore[no-untyped-def]
    """One head's shifts, strength, sharpness and gate."""
    shifting = np.empty(num_shifts, asked.dtype)
    largest = asked[width]
    for i in range(num_shifts):
        largest = max(largest, asked[width + i])
    total = _ZERO
    for i in range(num_shifts):
        shifting[i] = math.exp(asked[width + i] - largest)
        total += shifting[i]
    for i in range(num_shifts):
        shifting[i] /= total
    at = width + num_shifts
    return shifting, _softplus(asked[at]), _ONE + _softplus(asked[at + 1]), _sigmoid(asked[at + 2])


@compiled
def _sigmoid(x):  # type: ignore[no-untyped-def]
    # The exponent is never positive, so it cannot overflow.
    e = math.exp(-abs(x))
    return (_ONE if x >= _ZERO else e) / (_ONE + e)


@compiled
def _softplus(x):  # type: ignore[no-untyped-def]
    return max(x, _ZERO) + math.log1p(math.exp(-abs(x)))


@compiled
def _inverse_norm(squared_norm):  # type: ignore[no-untyped-def]
    """Of a memory row."""
    return _ONE / math.sqrt(min(max(squared_norm, _LEAST_SQUARED_NORM), _GREATEST_SQUARED_NORM))


@compiled
def _inverse_length(key):  # type: ignore[no-untyped-def]
    total = _ZERO
    for value in key:
        total += value * value
    return inverse_key_norm(total)


@compiled
def inverse_key_norm(squared_norm):  # type: ignore[no-untyped-def]
    """Of a key."""
    norm: Any = min(max(math.sqrt(squared_norm), _LEAST_KEY_NORM), _GREATEST_KEY_NORM)
    return _ONE / norm


@compiled
def is_differentiable_norm(inverse_norm):  # type: ignore[no-untyped-def]
    """Whether a key's norm counts as what it is."""
    return _ONE / _GREATEST_KEY_NORM < inverse_norm < _ONE / _LEAST_KEY_NORM


@compiled
def _add_rotated(source, by, factor, into):  # type: ignore[no-untyped-def]
    """Add `factor` times the source, moved forward by some rows round the ring."""
    num_rows = len(source)
    by %= num_rows
    for n in range(num_rows - by):
        into[by + n] += factor * source[n]
    for n in range(by):
        into[n] += factor * source[num_rows - by + n]


@compiled
def _rotated_product(one, source, by):  # type: ignore[no-untyped-def]
    """The inner product of `one` and the source moved forward by some rows round the ring."""
    num_rows = len(source)
    by %= num_rows
    total = _ZERO
    for n in range(num_rows - by):
        total += one[by + n] * source[n]
    for n in range(by):
        total += one[n] * source[num_rows - by + n]
    return total


@compiled
def _softmax(scores, into):  # type: ignore[no-untyped-def]
    largest = scores[0]
    for n in range(len(scores)):
        largest = max(largest, scores[n])
    total = _ZERO
    for n in range(len(scores)):
        into[n] = math.exp(scores[n] - largest)
    for n in range(len(scores)):
        total += into[n]
    inverse = _ONE / total
    for n in range(len(scores)):
        into[n] *= inverse


@compiled
def _log(attention, into):  # type: ignore[no-untyped-def]
    for n in range(len(attention)):
        into[n] = math.log(max(attention[n], _LEAST_ATTENTION))
