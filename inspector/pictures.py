"""The animation: a recording as a GIF, a frame for each moment.

Memory lies at the left, with the attention of every head beside it; at the right is the attention over time, with the
moment marked. A picture is made of palette indices from the start, so what is drawn is exact and small. The colours are
the page's, from `static/colours.json`.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from inspector import shown
from inspector.errors import BadRequestError
from inspector.recorder import Recording
from ntm.v1 import model_pb2

MAX_FRAMES = 300
FRAME_MS = 80
_COLOURS = json.loads((Path(__file__).parent / "static" / "colours.json").read_text(encoding="utf-8"))
_SHADES = 81
"""Shades of each of three colour maps; the palette has 256 entries, with four for text and marks."""
_SIGNED, _READ, _WRITE = 0, _SHADES, 2 * _SHADES
_GROUND, _INK, _FAINT = 252, 253, 254
_GAP, _TITLE, _MEMORY_HEIGHT, _STEP_WIDTH = 12, 28, 384, 6

Indices = npt.NDArray[np.uint8]


def animation(recording: Recording, *, is_dark: bool) -> bytes:
    """A recording as a GIF; at most `MAX_FRAMES` of its moments, evenly.

    Raises:
        BadRequestError: the model has neither a memory nor attention to draw.
    """
    moments = np.unique(np.linspace(0, recording.num_steps, MAX_FRAMES).round().astype(int))
    palette = _palette("dark" if is_dark else "light")
    images = []
    for indices, title in _frames(recording, moments):
        image = Image.fromarray(indices, mode="P")
        image.putpalette(palette)
        draw = ImageDraw.Draw(image)
        draw.text((_GAP, 8), title, fill=_INK, font=ImageFont.load_default(13))
        images.append(image)
    file = io.BytesIO()
    images[0].save(
        file,
        "GIF",
        save_all=True,
        append_images=images[1:],
        duration=FRAME_MS,
        loop=0,
        optimize=False,
        disposal=1,
    )
    return file.getvalue()


def _frames(recording: Recording, moments: npt.NDArray[np.int64]) -> Iterator[tuple[Indices, str]]:
    spec = recording.spec
    memories = [state for state in spec.states if state.role == model_pb2.STATE_ROLE_MEMORY][:1]
    heads = [
        (state.input_name, base)
        for role, base in (
            (model_pb2.STATE_ROLE_WRITE_WEIGHTING, _WRITE),
            (model_pb2.STATE_ROLE_READ_WEIGHTING, _READ),
        )
        for state in spec.states
        if state.role == role
    ]
    if not memories and not heads:
        raise BadRequestError("this model has no memory and no attention to animate")
    lanes = []
    for name, base in heads:
        rows = recording.states[name].rows()
        block = shown.attention(recording.states[name].shape, 512)
        weights = block.shown(rows)
        lanes += [(weights[:, head], base) for head in range(weights.shape[1])]
    strips = [
        _scaled(_shade(lane[1:].T, base), _lane_scale(len(lanes), lane.shape[1])) for lane, base in lanes
    ]
    counter = recording.first_step
    for moment in moments:
        parts = []
        if memories:
            column = recording.states[memories[0].input_name]
            block = shown.frame(column.shape, 2**15)
            memory = block.shown(column.rows()[moment : moment + 1])[0]
            most = float(np.abs(column.rows()).max()) or 1.0
            scale = max(1, _MEMORY_HEIGHT // memory.shape[0])
            parts.append(_grow(_signed(memory, most), scale, max(scale, min(8, 240 // memory.shape[1]))))
            parts += [
                _grow(_shade(lane[moment][:, np.newaxis], base), scale, 10)
                for lane, base in lanes
                if lane.shape[1] == memory.shape[0]
            ]
        if strips and recording.num_steps:
            parts.append(_stack([_marked(strip, moment, recording.num_steps) for strip in strips]))
        model = recording.session.model.info.model
        yield _beside(parts), f"{model.name}/{model.version}, after {counter + moment} steps"


def _palette(theme: str) -> list[int]:
    colours = _COLOURS[theme]
    entries = np.zeros((256, 3), np.uint8)
    for start, name in ((_SIGNED, "signed"), (_READ, "read"), (_WRITE, "write")):
        entries[start : start + _SHADES] = _ramp(colours[name], _SHADES)
    for index, name in ((_GROUND, "ground"), (_INK, "ink"), (_FAINT, "faint")):
        entries[index] = _rgb(colours[name])
    return [int(value) for value in entries.flat]


def _ramp(stops: list[str], count: int) -> npt.NDArray[np.uint8]:
    """As many colours between the stops, evenly; `static/colours.js` does the same."""
    places = np.linspace(0, len(stops) - 1, count)
    points = np.array([_rgb(stop) for stop in stops], np.float64)
    channels = [np.interp(places, range(len(stops)), points[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _shade(weights: shown.Floats, base: int) -> Indices:
    shades: Indices = (base + np.clip(weights, 0, 1) * (_SHADES - 1)).round().astype(np.uint8)
    return shades


def _signed(values: shown.Floats, most: float) -> Indices:
    middle = _SHADES // 2
    shades: Indices = (_SIGNED + middle + np.clip(values / most, -1, 1) * middle).round().astype(np.uint8)
    return shades


def _grow(indices: Indices, down: int, across: int) -> Indices:
    return indices.repeat(down, axis=0).repeat(across, axis=1)


def _lane_scale(num_lanes: int, rows: int) -> int:
    return max(1, (_MEMORY_HEIGHT - (num_lanes - 1) * _GAP) // num_lanes // rows)


def _scaled(lane: Indices, scale: int) -> Indices:
    width = max(1, min(_STEP_WIDTH, 720 // max(1, lane.shape[1])))
    grown = _grow(lane, scale, width)
    return grown[:, :: math.ceil(grown.shape[1] / 720)] if grown.shape[1] > 720 else grown


def _marked(strip: Indices, moment: int, num_steps: int) -> Indices:
    marked = strip.copy()
    place = min(strip.shape[1] - 1, max(0, round(moment * strip.shape[1] / num_steps)))
    marked[:, place] = _INK
    return marked


def _stack(parts: list[Indices]) -> Indices:
    width = max(part.shape[1] for part in parts)
    rows = []
    for part in parts:
        padded = np.full((part.shape[0] + _GAP, width), _GROUND, np.uint8)
        padded[: part.shape[0], : part.shape[1]] = part
        rows.append(padded)
    return np.concatenate(rows)


def _beside(parts: list[Indices]) -> Indices:
    height = max(part.shape[0] for part in parts) + _TITLE + _GAP
    width = max(280, sum(part.shape[1] + _GAP for part in parts) + _GAP)
    picture = np.full((height, width), _GROUND, np.uint8)
    left = _GAP
    for part in parts:
        picture[_TITLE : _TITLE + part.shape[0], left : left + part.shape[1]] = part
        left += part.shape[1] + _GAP
    return picture
