"""Paint time-of-flight contrast on a real vessel label, as a folder that `MRADataModule` reads.

    python experiments/painted.py --label vessels.nii.gz --out DIR

The whole head is painted, so that radii, inflow and tissue are those of the whole label, and boxes
that share no voxel are cut from it, those with the most vessels first: each becomes a subject,
painted under a seed of its own, and what is validated is never what was trained on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Bool
from scipy import ndimage

from lightning_segxai.data.phantom import paint_tof

Triple = tuple[int, int, int]


def densest_boxes(
    vessel: Bool[np.ndarray, "i j k"], edges: Triple, count: int
) -> list[tuple[slice, slice, slice]]:
    """Disjoint boxes with the most vessel voxels, each chosen beside those before it.

    Raises:
        ValueError: where the volume is smaller than a box, or holds fewer such boxes with vessels.
    """
    if any(n < e for n, e in zip(vessel.shape, edges, strict=True)):
        raise ValueError(f"--crop {edges} is larger than the label, which has {vessel.shape}.")
    held = vessel.astype(np.float64)
    for axis, edge in enumerate(edges):
        # origin moves the filter's window so that an index is the box's first voxel
        held = ndimage.uniform_filter1d(held, edge, axis=axis, mode="constant", origin=-(edge // 2))
    held = held[tuple(slice(0, n - e + 1) for n, e in zip(vessel.shape, edges, strict=True))].copy()
    boxes: list[tuple[slice, slice, slice]] = []
    for _ in range(count):
        corner = np.unravel_index(int(held.argmax()), held.shape)
        if held[corner] * np.prod(edges) < 0.5:
            raise ValueError(
                f"--volumes {count} needs as many disjoint boxes of --crop {edges} with vessels, "
                f"but only {len(boxes)} were found. Ask for fewer or smaller ones."
            )
        i, j, k = (slice(int(c), int(c) + e) for c, e in zip(corner, edges, strict=True))
        boxes.append((i, j, k))
        held[
            tuple(slice(max(0, int(c) - e + 1), c + e) for c, e in zip(corner, edges, strict=True))
        ] = 0
    return boxes


def paint_subjects(label: Path, out: Path, volumes: int, crop: Triple, seed: int) -> Iterator[str]:
    """Write the subjects one by one, and tell of each."""
    file = nib.as_closest_canonical(nib.load(label))  # `paint_tof` needs k to go up
    vessel = np.asarray(file.dataobj) > 0
    i, j, k = (float(edge) for edge in file.header.get_zooms()[:3])
    boxes = densest_boxes(vessel, crop, volumes)
    for folder in ("images", "labels"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for n, box in enumerate(boxes, start=1):
        image = paint_tof(vessel, (i, j, k), seed=seed + n)[box]
        affine = file.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ [edge.start for edge in box]
        name = f"painted-{n:02d}.nii.gz"
        nib.save(nib.Nifti1Image(image, affine), out / "images" / name)
        nib.save(nib.Nifti1Image(vessel[box].astype(np.uint8), affine), out / "labels" / name)
        corner = ", ".join(str(edge.start) for edge in box)
        yield f"{name}: {crop} voxels from ({corner}), {vessel[box].mean():.2%} vessel"


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--label", type=Path, required=True, help="a vessel label as NIfTI")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--volumes", type=int, default=4, help="how many subjects (%(default)s)")
    parser.add_argument(
        "--crop", type=int, nargs=3, default=(96, 96, 64), help="voxels of each (96 96 64)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of tissue and noise (%(default)s)")
    asked = parser.parse_args(argv)
    if asked.volumes < 2 or min(asked.crop) < 1:
        parser.error("--volumes must be at least 2, one of them for validation, and --crop above 0")
    try:
        for line in paint_subjects(
            asked.label, asked.out, asked.volumes, tuple(asked.crop), asked.seed
        ):
            print(line, flush=True)
    except (OSError, ValueError, nib.filebasedimages.ImageFileError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
