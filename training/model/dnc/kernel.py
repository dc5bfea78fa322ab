"""The kernel: `access.py` as one compiled operation with a gradient worked out by hand, for training on a CPU.

See `training.model.kernel`, whose reasons and rules are these too; compiled for float32 and for float64, each when it
is first called. A test holds it to the torch operations, values and gradients.

Shapes: B batch, R read heads, N memory rows, M row width, P numbers that the heads ask for, K rows that the way
back needs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from training.model.addressing import GREATEST_SQUARED_NORM, LEAST_ATTENTION, LEAST_SQUARED_NORM
from training.model.dnc.access import LEAST_USAGE, USAGE_LEVELS, Accessed
from training.model.dnc.heads import DNCSizes
from training.model.kernel import (
    _inverse_norm,
    _log,
    _sigmoid,
    _softmax,
    _softplus,
    compiled,
    inverse_key_norm,
    is_differentiable_norm,
)

_LEAST_ATTENTION = np.float32(LEAST_ATTENTION)
_LEAST_SQUARED_NORM = np.float32(LEAST_SQUARED_NORM)
_GREATEST_SQUARED_NORM = np.float32(GREATEST_SQUARED_NORM)
_LEAST_USAGE = np.float32(LEAST_USAGE)
_USAGE_LEVELS = np.float32(USAGE_LEVELS)
_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)

# What is kept for the way back, in rows of N: these, then for each read head the six of _OF_READ.
_RETAINED, _ALLOCATED, _ORDER, _LIKENESS, _CONTENT, _NUM_KEPT = range(6)
_READ_LIKENESS, _READ_CONTENT, _LED_BACKWARD, _LED_FORWARD, _BACKWARD, _FORWARD, _NUM_KEPT_OF_READ = range(7)


def compiled_access(requested: Tensor, before: Accessed, sizes: DNCSizes) -> Accessed:
    """What `access.access_memory` does, on a CPU, with a gradient."""
    *contents, _ = before
    return Accessed(*_CompiledAccess.apply(sizes, requested, *contents))  # type: ignore[no-untyped-call]


class _CompiledAccess(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sizes: DNCSizes, *inputs: Tensor) -> tuple[Tensor, ...]:
        inputs = tuple(tensor.contiguous() for tensor in inputs)
        _, *before = inputs
        batch, _, num_rows = before[0].shape
        after = [torch.empty_like(tensor) for tensor in before]
        read_vectors = inputs[0].new_empty(batch, sizes.num_read_heads, sizes.row_width)
        kept = inputs[0].new_empty(batch, _NUM_KEPT + _NUM_KEPT_OF_READ * sizes.num_read_heads, num_rows)
        access_memory_forward(*sizes.improvements, *_arrays(*inputs, *after, read_vectors, kept))
        ctx.save_for_backward(*inputs, *after, kept)
        ctx.improvements = sizes.improvements
        return (*after, read_vectors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors[:7]
        grad_inputs = [torch.empty_like(tensor) for tensor in inputs]
        grad_outputs = tuple(tensor.contiguous() for tensor in grad_outputs)
        access_memory_backward(*ctx.improvements, *_arrays(*ctx.saved_tensors, *grad_outputs, *grad_inputs))
        return (None, *grad_inputs)


def _arrays(*tensors: Tensor) -> list[Any]:
    return [tensor.detach().numpy() for tensor in tensors]


@compiled
def access_memory_forward(  # type: ignore[no-untyped-def]
    is_masked,
    is_cleared,
    is_sharp,
    requested,
    memory,
    usage,
    writing,
    precedence,
    links,
    reading,
    next_memory,
    next_usage,
    next_writing,
    next_precedence,
    next_links,
    next_reading,
    read_vectors,
    kept,
):
    """Fill what comes out, and what the way back needs."""
    num_batch, width, num_rows = memory.shape
    num_reads = reading.shape[1]
    at_strength = width * (1 + is_masked)
    at_sharpness = at_strength + 1
    at_modes = at_sharpness + 2 * is_sharp
    per_read = at_modes + 4
    at_erase, at_add, at_gates = at_strength + 1, at_strength + 1 + width, at_strength + 1 + 2 * width
    scores = np.empty(num_rows, memory.dtype)
    modes = np.empty(3, memory.dtype)
    for b in range(num_batch):
        asked_write = requested[b, num_reads * per_read :]
        retained, allocated, order = kept[b, _RETAINED], kept[b, _ALLOCATED], kept[b, _ORDER]
        content = kept[b, _CONTENT]

        retained[:] = _ONE
        for r in range(num_reads):
            free = _sigmoid(requested[b, r * per_read + at_modes + 3])
            for n in range(num_rows):
                retained[n] *= _ONE - free * reading[b, r, n]
        for n in range(num_rows):
            in_use = usage[b, n] + writing[b, 0, n] - usage[b, n] * writing[b, 0, n]
            next_usage[b, n] = in_use * retained[n]
        _allocate(next_usage[b], order, allocated)
        _look_up(asked_write, is_masked, at_strength, memory[b], scores, kept[b, _LIKENESS], content)
        allocation, update = _sigmoid(asked_write[at_gates]), _sigmoid(-asked_write[at_gates])
        gate = _sigmoid(asked_write[at_gates + 1])
        written = next_writing[b, 0]
        for n in range(num_rows):
            written[n] = gate * (allocation * allocated[n] + update * content[n])

        for m in range(width):
            erase, add = _sigmoid(asked_write[at_erase + m]), asked_write[at_add + m]
            for n in range(num_rows):
                left = memory[b, m, n] * (retained[n] if is_cleared else _ONE)
                next_memory[b, m, n] = left + (add - erase * left) * written[n]

        for i in range(num_rows):
            for j in range(num_rows):
                kept_link = (_ONE - written[i] - written[j]) * links[b, i, j]
                next_links[b, i, j] = kept_link + written[i] * precedence[b, j]
            next_links[b, i, i] = _ZERO
        total = _ZERO
        for n in range(num_rows):
            total += written[n]
        for n in range(num_rows):
            next_precedence[b, n] = precedence[b, n] + written[n] - total * precedence[b, n]

        for r in range(num_reads):
            asked = requested[b, r * per_read : (r + 1) * per_read]
            mine = kept[b, _NUM_KEPT + r * _NUM_KEPT_OF_READ :]
            led_backward, led_forward = mine[_LED_BACKWARD], mine[_LED_FORWARD]
            backward, forward, content = mine[_BACKWARD], mine[_FORWARD], mine[_READ_CONTENT]
            led_backward[:] = _ZERO
            for i in range(num_rows):
                for j in range(num_rows):
                    led_backward[j] += reading[b, r, i] * next_links[b, i, j]
            for i in range(num_rows):
                led_forward[i] = _inner(next_links[b, i], reading[b, r])
            if is_sharp:
                _sharpen(led_backward, asked[at_sharpness], scores, backward)
                _sharpen(led_forward, asked[at_sharpness + 1], scores, forward)
            else:
                backward[:] = led_backward
                forward[:] = led_forward
            _look_up(asked, is_masked, at_strength, next_memory[b], scores, mine[_READ_LIKENESS], content)
            _softmax(asked[at_modes : at_modes + 3], modes)
            for n in range(num_rows):
                next_reading[b, r, n] = modes[0] * backward[n] + modes[1] * content[n] + modes[2] * forward[n]
            for m in range(width):
                read_vectors[b, r, m] = _inner(next_reading[b, r], next_memory[b, m])


@compiled
def access_memory_backward(  # type: ignore[no-untyped-def]
    is_masked,
    is_cleared,
    is_sharp,
    requested,
    memory,
    usage,
    writing,
    precedence,
    links,
    reading,
    next_memory,
    next_usage,
    next_writing,
    next_precedence,
    next_links,
    next_reading,
    kept,
    grad_next_memory,
    grad_next_usage,
    grad_next_writing,
    grad_next_precedence,
    grad_next_links,
    grad_next_reading,
    grad_read_vectors,
    grad_requested,
    grad_memory,
    grad_usage,
    grad_writing,
    grad_precedence,
    grad_links,
    grad_reading,
):
    """Fill the gradients of what went in, from those of what came out, in the opposite order."""
    num_batch, width, num_rows = memory.shape
    num_reads = reading.shape[1]
    at_strength = width * (1 + is_masked)
    at_sharpness = at_strength + 1
    at_modes = at_sharpness + 2 * is_sharp
    per_read = at_modes + 4
    at_erase, at_add, at_gates = at_strength + 1, at_strength + 1 + width, at_strength + 1 + 2 * width
    modes = np.empty(3, memory.dtype)
    grad_modes = np.empty(3, memory.dtype)
    scores = np.empty(num_rows, memory.dtype)
    grad_attention = np.empty(num_rows, memory.dtype)
    grad_backward = np.empty(num_rows, memory.dtype)
    grad_forward = np.empty(num_rows, memory.dtype)
    grad_written = np.empty(num_rows, memory.dtype)
    grad_retained = np.empty(num_rows, memory.dtype)
    grad_in_use = np.empty(num_rows, memory.dtype)
    grad_content = np.empty(num_rows, memory.dtype)
    grad_after = np.empty((width, num_rows), memory.dtype)
    left = np.empty(num_rows, memory.dtype)
    for b in range(num_batch):
        asked_write, grad_asked_write = (
            requested[b, num_reads * per_read :],
            grad_requested[b, num_reads * per_read :],
        )
        retained, allocated, content = kept[b, _RETAINED], kept[b, _ALLOCATED], kept[b, _CONTENT]
        written = next_writing[b, 0]

        # Reading.
        grad_after[:] = grad_next_memory[b]
        grad_links[b] = grad_next_links[b]
        for r in range(num_reads):
            asked, grad_asked = (
                requested[b, r * per_read : (r + 1) * per_read],
                grad_requested[b, r * per_read : (r + 1) * per_read],
            )
            mine = kept[b, _NUM_KEPT + r * _NUM_KEPT_OF_READ :]
            grad_attention[:] = grad_next_reading[b, r]
            for m in range(width):
                grad_read = grad_read_vectors[b, r, m]
                for n in range(num_rows):
                    grad_attention[n] += grad_read * next_memory[b, m, n]
                for n in range(num_rows):
                    grad_after[m, n] += grad_read * next_reading[b, r, n]
            _softmax(asked[at_modes : at_modes + 3], modes)
            grad_modes[0] = _inner(grad_attention, mine[_BACKWARD])
            grad_modes[1] = _inner(grad_attention, mine[_READ_CONTENT])
            grad_modes[2] = _inner(grad_attention, mine[_FORWARD])
            mean = grad_modes[0] * modes[0] + grad_modes[1] * modes[1] + grad_modes[2] * modes[2]
            for i in range(3):
                grad_asked[at_modes + i] = modes[i] * (grad_modes[i] - mean)
            for n in range(num_rows):
                grad_backward[n] = modes[0] * grad_attention[n]
                grad_content[n] = modes[1] * grad_attention[n]
                grad_forward[n] = modes[2] * grad_attention[n]
            _look_up_backward(
                asked,
                is_masked,
                at_strength,
                next_memory[b],
                mine[_READ_LIKENESS],
                mine[_READ_CONTENT],
                grad_content,
                grad_after,
                grad_asked,
            )
            if is_sharp:
                grad_asked[at_sharpness] = _sharpen_backward(
                    mine[_LED_BACKWARD], asked[at_sharpness], mine[_BACKWARD], scores, grad_backward
                )
                grad_asked[at_sharpness + 1] = _sharpen_backward(
                    mine[_LED_FORWARD], asked[at_sharpness + 1], mine[_FORWARD], scores, grad_forward
                )
            grad_reading_now = grad_reading[b, r]
            for i in range(num_rows):
                grad_reading_now[i] = _inner(next_links[b, i], grad_backward)
            for i in range(num_rows):
                for j in range(num_rows):
                    grad_reading_now[j] += next_links[b, i, j] * grad_forward[i]
                for j in range(num_rows):
                    grad_links[b, i, j] += (
                        grad_backward[j] * reading[b, r, i] + grad_forward[i] * reading[b, r, j]
                    )

        # Precedence and links.
        total, along = _ZERO, _ZERO
        for n in range(num_rows):
            total += written[n]
            along += grad_next_precedence[b, n] * precedence[b, n]
        for n in range(num_rows):
            grad_precedence[b, n] = grad_next_precedence[b, n] * (_ONE - total)
            grad_written[n] = grad_next_writing[b, 0, n] + grad_next_precedence[b, n] - along
        for i in range(num_rows):
            grad_links[b, i, i] = _ZERO
            grad_written[i] += _inner(grad_links[b, i], precedence[b]) - _inner(grad_links[b, i], links[b, i])
            for j in range(num_rows):
                grad_written[j] -= grad_links[b, i, j] * links[b, i, j]
            for j in range(num_rows):
                grad_precedence[b, j] += grad_links[b, i, j] * written[i]
            for j in range(num_rows):
                grad_links[b, i, j] *= _ONE - written[i] - written[j]

        # Writing.
        grad_retained[:] = _ZERO
        for m in range(width):
            erase, add = _sigmoid(asked_write[at_erase + m]), asked_write[at_add + m]
            for n in range(num_rows):
                left[n] = memory[b, m, n] * (retained[n] if is_cleared else _ONE)
            grad_erase, grad_add = _ZERO, _ZERO
            for n in range(num_rows):
                grad_erase -= grad_after[m, n] * left[n] * written[n]
                grad_add += grad_after[m, n] * written[n]
            grad_asked_write[at_erase + m] = grad_erase * erase * (_ONE - erase)
            grad_asked_write[at_add + m] = grad_add
            for n in range(num_rows):
                grad_written[n] += grad_after[m, n] * (add - erase * left[n])
            for n in range(num_rows):
                grad_left = grad_after[m, n] * (_ONE - erase * written[n])
                grad_memory[b, m, n] = grad_left * (retained[n] if is_cleared else _ONE)
                grad_retained[n] += grad_left * memory[b, m, n] if is_cleared else _ZERO
        allocation, update = _sigmoid(asked_write[at_gates]), _sigmoid(-asked_write[at_gates])
        gate = _sigmoid(asked_write[at_gates + 1])
        grad_gate, grad_allocation = _ZERO, _ZERO
        for n in range(num_rows):
            grad_gate += grad_written[n] * (allocation * allocated[n] + update * content[n])
            grad_allocation += grad_written[n] * (allocated[n] - content[n])
        grad_asked_write[at_gates] = gate * grad_allocation * allocation * update
        grad_asked_write[at_gates + 1] = grad_gate * gate * (_ONE - gate)
        for n in range(num_rows):
            grad_content[n] = gate * update * grad_written[n]
            grad_written[n] *= gate * allocation  # From here on of what is allocated.
        _look_up_backward(
            asked_write,
            is_masked,
            at_strength,
            memory[b],
            kept[b, _LIKENESS],
            content,
            grad_content,
            grad_memory[b],
            grad_asked_write,
        )

        # Usage.
        grad_in_use[:] = grad_next_usage[b]
        _allocate_backward(next_usage[b], kept[b, _ORDER], allocated, grad_written, grad_in_use)
        for n in range(num_rows):
            in_use = usage[b, n] + writing[b, 0, n] - usage[b, n] * writing[b, 0, n]
            grad_retained[n] += grad_in_use[n] * in_use
            grad_usage[b, n] = grad_in_use[n] * retained[n] * (_ONE - writing[b, 0, n])
            grad_writing[b, 0, n] = grad_in_use[n] * retained[n] * (_ONE - usage[b, n])
        for r in range(num_reads):
            free = _sigmoid(requested[b, r * per_read + at_modes + 3])
            for n in range(num_rows):
                scores[n] = grad_retained[n]
            for other in range(num_reads):
                if other != r:
                    freed = _sigmoid(requested[b, other * per_read + at_modes + 3])
                    for n in range(num_rows):
                        scores[n] *= _ONE - freed * reading[b, other, n]
            grad_free = -_inner(scores, reading[b, r])
            grad_requested[b, r * per_read + at_modes + 3] = grad_free * free * (_ONE - free)
            for n in range(num_rows):
                grad_reading[b, r, n] -= scores[n] * free


@compiled
def _inner(one, other):  # type: ignore[no-untyped-def]
    total = _ZERO
    for n in range(len(one)):
        total += one[n] * other[n]
    return total


@compiled
def _allocate(usage, order, allocated):  # type: ignore[no-untyped-def]
    num_rows = len(usage)
    places = np.empty(num_rows, usage.dtype)
    for n in range(num_rows):
        places[n] = np.rint(usage[n] * _USAGE_LEVELS) * num_rows + n
    left = _ONE
    for at, n in enumerate(np.argsort(places)):
        order[at] = n
        used = _LEAST_USAGE + (_ONE - _LEAST_USAGE) * usage[n]
        allocated[n] = (_ONE - used) * left
        left *= used


@compiled
def _allocate_backward(usage, order, allocated, grad_allocated, grad_usage):  # type: ignore[no-untyped-def]
    """Add to the gradient of the usage."""
    num_rows = len(usage)
    left = np.empty(num_rows, usage.dtype)
    left[0] = _ONE
    for at in range(num_rows - 1):
        left[at + 1] = left[at] * (_LEAST_USAGE + (_ONE - _LEAST_USAGE) * usage[int(order[at])])
    behind = _ZERO
    for at in range(num_rows - 1, -1, -1):
        n = int(order[at])
        used = _LEAST_USAGE + (_ONE - _LEAST_USAGE) * usage[n]
        grad_usage[n] += (_ONE - _LEAST_USAGE) * (behind / used - grad_allocated[n] * left[at])
        behind += grad_allocated[n] * allocated[n]


@compiled
def _sharpen(led, number, scores, into):  # type: ignore[no-untyped-def]
    sharpness = _ONE + _softplus(number)
    _log(led, scores)
    for n in range(len(led)):
        scores[n] *= sharpness
    _softmax(scores, into)


@compiled
def _sharpen_backward(led, number, sharp, scores, grad_sharp):  # type: ignore[no-untyped-def]
    """Put the gradient of what the links lead to in the place of `grad_sharp`; returns that of the number."""
    sharpness = _ONE + _softplus(number)
    mean = _inner(grad_sharp, sharp)
    _log(led, scores)
    for n in range(len(led)):
        grad_sharp[n] = sharp[n] * (grad_sharp[n] - mean)
    grad_sharpness = _inner(grad_sharp, scores)
    for n in range(len(led)):
        is_kept = _ONE if led[n] > _LEAST_ATTENTION else _ZERO
        grad_sharp[n] *= is_kept * sharpness / max(led[n], _LEAST_ATTENTION)
    return grad_sharpness * _sigmoid(number)


@compiled
def _masked_key(asked, is_masked, width):  # type: ignore[no-untyped-def]
    """The mask, the key times it at length 1, and one over the length that it had."""
    mask = np.ones(width, asked.dtype)
    key = np.empty(width, asked.dtype)
    for m in range(width):
        if is_masked:
            mask[m] = _sigmoid(asked[width + m])
        key[m] = asked[m] * mask[m]
    inverse = inverse_key_norm(_inner(key, key))
    for m in range(width):
        key[m] *= inverse
    return mask, key, inverse


@compiled
def _inverse_norms(memory, mask, into):  # type: ignore[no-untyped-def]
    width, num_rows = memory.shape
    into[:] = _ZERO
    for m in range(width):
        weight = mask[m] * mask[m]
        for n in range(num_rows):
            into[n] += weight * memory[m, n] * memory[m, n]
    for n in range(num_rows):
        into[n] = _inverse_norm(into[n])


@compiled
def _look_up(asked, is_masked, at_strength, memory, scores, likeness, content):  # type: ignore[no-untyped-def]
    width, num_rows = memory.shape
    mask, key, _ = _masked_key(asked, is_masked, width)
    strength = _ONE + _softplus(asked[at_strength])
    _inverse_norms(memory, mask, scores)
    likeness[:] = _ZERO
    for m in range(width):
        weight = key[m] * mask[m]
        for n in range(num_rows):
            likeness[n] += weight * memory[m, n]
    for n in range(num_rows):
        likeness[n] *= scores[n]
        scores[n] = strength * likeness[n]
    _softmax(scores, content)


@compiled
def _look_up_backward(  # type: ignore[no-untyped-def]
    asked, is_masked, at_strength, memory, likeness, content, grad_content, grad_memory, grad_asked
):
    """Add to the gradient of the memory, and fill those of what is asked: key, mask and strength."""
    width, num_rows = memory.shape
    mask, key, inverse_key = _masked_key(asked, is_masked, width)
    strength = _ONE + _softplus(asked[at_strength])
    inverse_norms = np.empty(num_rows, asked.dtype)
    grad_likeness = np.empty(num_rows, asked.dtype)
    grad_squares = np.empty(num_rows, asked.dtype)
    grad_key = np.empty(width, asked.dtype)
    grad_mask = np.zeros(width, asked.dtype)
    _inverse_norms(memory, mask, inverse_norms)
    mean = _inner(grad_content, content)
    for n in range(num_rows):
        grad_likeness[n] = content[n] * (grad_content[n] - mean)
    grad_asked[at_strength] = _inner(grad_likeness, likeness) * _sigmoid(asked[at_strength])
    least = _inverse_norm(memory.dtype.type(_GREATEST_SQUARED_NORM))
    greatest = _inverse_norm(memory.dtype.type(_LEAST_SQUARED_NORM))
    for n in range(num_rows):
        grad_likeness[n] *= strength
        is_kept = _ONE if least < inverse_norms[n] < greatest else _ZERO
        # Twice the gradient of the sum of squares under the root.
        grad_squares[n] = -is_kept * grad_likeness[n] * likeness[n] * inverse_norms[n] * inverse_norms[n]
        grad_likeness[n] *= inverse_norms[n]
    along = _ZERO
    for m in range(width):
        weight, square = key[m] * mask[m], mask[m] * mask[m]
        grad_weight, grad_square = _ZERO, _ZERO
        for n in range(num_rows):
            grad_weight += grad_likeness[n] * memory[m, n]
            grad_square += grad_squares[n] * memory[m, n] * memory[m, n]
        for n in range(num_rows):
            grad_memory[m, n] += weight * grad_likeness[n] + square * grad_squares[n] * memory[m, n]
        grad_mask[m] = grad_weight * key[m] + grad_square * mask[m]
        grad_key[m] = grad_weight * mask[m]
        along += grad_key[m] * key[m]
    if not is_differentiable_norm(inverse_key):
        along = _ZERO
    for m in range(width):
        grad_product = (grad_key[m] - along * key[m]) * inverse_key
        grad_asked[m] = grad_product * mask[m]
        if is_masked:
            grad_mask[m] += grad_product * asked[m]
            grad_asked[width + m] = grad_mask[m] * mask[m] * (_ONE - mask[m])
