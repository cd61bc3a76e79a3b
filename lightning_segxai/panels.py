"""Single tiles of a montage: anatomy, the prediction's errors, a map projected and in a slice.

Tiles show the plane of i (to the right) and j (up), in millimeters: a voxel is as wide and high as
its spacing says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageFilter
from scipy.ndimage import maximum_filter
from torch import Tensor

from lightning_segxai import colors
from lightning_segxai.values import Attribution, Probe

Plane = Float[np.ndarray, "h w"]
Tile = UInt8[np.ndarray, "h w 3"]

_FAINT = 95
"""Brightest gray of the anatomy beneath a map."""


@dataclass(frozen=True)
class View:
    """How the plane of i and j becomes a tile.

    Args:
        width: Pixels along i.
        height: Pixels along j.
    """

    width: int
    height: int

    @classmethod
    def of(cls, probe: Probe, edge: int) -> View:
        """The view whose longer edge has ``edge`` pixels."""
        across, up = (n * mm for n, mm in zip(probe.shape[:2], probe.spacing_mm[:2], strict=True))
        scale = edge / max(across, up)
        return cls(max(8, round(across * scale)), max(8, round(up * scale)))

    def __call__(self, plane: Tensor | np.ndarray, finer: int = 1) -> Plane:
        """The plane resampled to the tile's pixels, or to ``finer`` times as many."""
        if isinstance(plane, Tensor):
            plane = plane.detach().cpu().float().numpy()
        array = np.asarray(plane, dtype=np.float32)
        image = Image.fromarray(np.ascontiguousarray(array.T[::-1]))
        size = (self.width * finer, self.height * finer)
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def target_slice(attribution: Attribution) -> int:
    """The k where the region is largest, nearest the middle among equals.

    For an empty region that of the label, or else of the prediction; the middle without any.
    """
    region, label = attribution.region.cpu(), attribution.probe.label
    others = () if label is None else (label.cpu() > 0,)
    middle = (region.shape[2] - 1) / 2
    for mask in (region, *others, attribution.prediction.cpu() > 0):
        if bool(mask.any()):
            area = mask.sum(dim=(0, 1))
            largest = torch.nonzero(area == area.max()).flatten()
            return int(largest[(largest - middle).abs().argmin()])
    return region.shape[2] // 2


def projected_anatomy(probe: Probe) -> Float[Tensor, "i j"]:
    """Largest intensity along k of the first channel."""
    return probe.image[0].amax(dim=2)


def outcomes(probe: Probe, prediction: Int[Tensor, "i j k"]) -> dict[str, Bool[Tensor, "i j k"]]:
    """Masks of what the prediction came to, by their names in `colors.OUTCOMES`.

    All classes but 0 are foreground.
    """
    predicted = prediction.cpu() > 0
    if probe.label is None:
        return {"predicted, no label": predicted}
    truth = probe.label.cpu() > 0
    return {
        "true positive": predicted & truth,
        "false positive": predicted & ~truth,
        "false negative": truth & ~predicted,
    }


def projected(masks: Mapping[str, Bool[Tensor, "i j k"]]) -> dict[str, Bool[Tensor, "i j"]]:
    """For each line along k the mask with most of its voxels; the later one among equals."""
    counts = torch.stack([mask.sum(dim=2) for mask in masks.values()])
    winner = len(masks) - 1 - counts.flip(0).argmax(dim=0)  # flip: argmax takes the first
    return {name: (winner == n) & (counts[n] > 0) for n, name in enumerate(masks)}


def gray(anatomy: Float[Tensor, "i j"], view: View) -> Plane:
    """Anatomy from 0 to 1, between the percentiles 1 and 99.5 of what is shown.

    Lifted by a power of 0.7: between vessels as bright as in angiography the tissue would be black.
    """
    array = anatomy.detach().cpu().double().contiguous().numpy()
    return _gray(array.tobytes(), array.shape, view)


@lru_cache(maxsize=8)  # all maps of a target have the same, at every validation
def _gray(anatomy: bytes, shape: tuple[int, int], view: View) -> Plane:
    array = np.frombuffer(anatomy, dtype=np.float64).reshape(shape)
    low, high = np.percentile(array, (1.0, 99.5))
    return np.clip(view((array - low) / max(high - low, 1e-12)), 0.0, 1.0) ** 0.7


def errors(
    anatomy: Float[Tensor, "i j"], masks: Mapping[str, Bool[Tensor, "i j"]], view: View
) -> Tile:
    """Colored masks over gray anatomy, whose relief stays faintly visible in them."""
    relief = gray(anatomy, view)
    cover = np.stack([np.clip(view(mask.float()), 0.0, 1.0) for mask in masks.values()])
    cover /= np.maximum(cover.sum(axis=0), 1.0)
    palette = np.array([colors.OUTCOMES[name] for name in masks], dtype=np.float64)
    bare, shine = (1.0 - cover.sum(axis=0)) * 200.0 * relief, 0.8 + 0.2 * relief
    tile = np.empty((*relief.shape, 3), dtype=np.uint8)
    for c in range(3):  # NumPy is slow along an axis as short as that of the colors
        ink = sum(share * color for share, color in zip(cover, palette[:, c], strict=True))
        tile[..., c] = _bytes(ink * shine + bare)
    return tile


@dataclass(frozen=True)
class MapTiles:
    """A map in both its views.

    Args:
        projection: Largest magnitude along k, with its sign.
        cut: The slice through the target, over faint anatomy.
        signed: Whether negative values are visible, and the diverging scale is used.
    """

    projection: Tile
    cut: Tile
    signed: bool


def map_tiles(attribution: Attribution, k: int, view: View) -> MapTiles | None:
    """Both tiles of a map, or None where there is nothing that a scale could show."""
    values = attribution.values.detach().cpu()
    mean = colors.mean_magnitude(values) if attribution.status == "ok" else None
    if mean is None:
        return None
    # What lies below 1x is black whatever its sign, and does not make a map signed.
    signed = float(values.min()) <= -mean
    strongest = values.abs().argmax(dim=2, keepdim=True)
    top = _positions(values.gather(2, strongest)[..., 0], mean, view)
    cut = _positions(values[:, :, k], mean, view)
    # Anatomy has gone at 4x, so from there on the colors are those of the scale.
    fade = (
        np.clip(1.0 - 5.0 * np.abs(cut), 0.0, 1.0)
        * _FAINT
        * gray(attribution.probe.image[0, :, :, k], view)
    )
    over = colors.paint(cut, signed=signed)
    for c in range(3):
        over[..., c] = _bytes(over[..., c] + fade)
    return MapTiles(colors.paint(top, signed=signed), over, signed)


def outlined(tile: Tile, mask: Bool[Tensor, "i j"], view: View) -> Tile:
    """The tile with a thin white line around the mask; it runs outside, so it hides nothing."""
    plane = mask.cpu().contiguous().numpy()
    alpha = _outline(plane.tobytes(), plane.shape, view)
    line = alpha[..., 0] > 0  # a small part of the tile
    drawn = tile.copy()
    drawn[line] = _bytes((1 - alpha[line]) * tile[line] + alpha[line] * 255)
    return drawn


@lru_cache(maxsize=8)  # all maps of a target have the same
def _outline(mask: bytes, shape: tuple[int, int], view: View) -> np.ndarray:
    """How white each pixel of the tile is, from 0 to 1."""
    finer = 3
    plane = np.frombuffer(mask, dtype=np.bool_).reshape(shape).astype(np.float32)
    voxel = min(view.width / shape[0], view.height / shape[1]) * finer
    # Blurred by half a voxel, corners of voxels become a smooth line; 0.4 keeps single voxels.
    cover = Image.fromarray(np.uint8(255 * np.clip(view(plane, finer), 0.0, 1.0)))
    inside = cover.filter(ImageFilter.GaussianBlur(0.5 * voxel)).point(lambda p: 255 * (p > 102))
    full = np.asarray(inside)
    ring = maximum_filter(full, 2 * finer + 1, mode="nearest") - full
    parts = ring.reshape(view.height, finer, view.width, finer)
    return 0.85 * parts.mean(axis=(1, 3))[..., None] / 255


def _positions(values: Float[Tensor, "i j"], mean: float, view: View) -> Plane:
    """Values on the color scale, resampled there.

    Either sign by itself: between a positive and a negative voxel one color meets the other, with
    no dark seam of zeros that neither has.
    """
    position = colors.positions(values.double().numpy(), mean)
    above, below = view(position.clip(min=0.0)), view(-position.clip(max=0.0))
    return np.where(above >= below, above, -below).clip(-1.0, 1.0)


def _bytes(color: np.ndarray) -> UInt8[np.ndarray, "*axes"]:
    return np.rint(np.clip(color, 0.0, 255.0)).astype(np.uint8)
