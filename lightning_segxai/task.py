"""Training of a segmentation network: any network, any loss, batches of TorchIO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy.ndimage import label as label_pieces
from skimage.morphology import skeletonize
from torch import Tensor, nn

from lightning_segxai.consistency import DeformationConsistency
from lightning_segxai.losses import DeepSupervision, FocalTverskyLoss, finest, heads
from lightning_segxai.values import as_shape
from lightning_segxai.windows import Windows


class SegmentationTask(pl.LightningModule):
    """Trains a segmentation network, validates it, and predicts whole volumes by windows.

    One channel of logits is a sigmoid, class 1 its foreground; more are a softmax with class 0 as
    background. What the network returns (a tensor, or the tuple of a supervised one) goes to the
    loss as it is; everything else looks at its first output of full resolution. Logged are
    ``train_loss`` at every step, and over the epoch ``val_loss``, ``val_dice`` and
    ``val_cldice`` (``test_`` in tests); with ``consistency`` also ``train_consistency``.
    Both scores are in [0, 1], means over volumes and foreground classes; a class that is neither
    in the label nor in the prediction of a volume has no score and does not count, and where none
    counts in the whole epoch they are NaN. A loss that is NaN is logged and returned as it is.

    Args:
        net: Volumes b c i j k to logits b classes i j k, or a tuple of logits.
        loss: What the network returned and a label b 1 i j k of class indices to one number;
            without one, focal Tversky, summed over the outputs by `DeepSupervision`.
        lr: Learning rate of Adam.
        window: Voxels of the windows by which validation and prediction go through a volume;
            without it, the network takes volumes whole.
        overlap: Share of a window that the next one covers again, in [0, 1).
        consistency: Trains on deformed volumes too, and for the same prediction there; without it,
            on volumes as they come.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: nn.Module | None = None,
        lr: float = 1e-3,
        window: int | Sequence[int] | None = None,
        overlap: float = 0.5,
        consistency: DeformationConsistency | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["net", "loss", "consistency"])
        self.net = net
        self.loss = DeepSupervision(FocalTverskyLoss()) if loss is None else loss
        self.lr = lr
        self.window = None if window is None else as_shape(window, "window")
        self.overlap = overlap
        self.consistency = consistency

    def forward(self, x: Float[Tensor, "b c i j k"]) -> Any:
        """What the network returns."""
        return self.net(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam; clipping and accumulation of gradients are the Trainer's."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of all outputs, and what ``consistency`` adds."""
        image, label = _image(batch), _label(batch)
        outputs = self(image)
        several = len(heads(outputs))
        if several > 1 and isinstance(self.loss, FocalTverskyLoss):
            raise ValueError(
                f"`SegmentationTask` got {several} outputs of `{type(self.net).__name__}`, but "
                "`FocalTverskyLoss` takes one. Wrap it: `DeepSupervision(FocalTverskyLoss())`."
            )
        loss: Tensor = self.loss(outputs, label)
        if self.consistency is not None:
            step = (self.current_epoch, batch_idx, self.global_rank)
            deformed, difference = self.consistency.terms(
                self, self.loss, image, label, outputs, step
            )
            loss = loss + deformed + self.consistency.weight * difference
            self.log("train_consistency", difference, batch_size=len(image))
        self.log("train_loss", loss, prog_bar=True, batch_size=len(image))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss, Dice and clDice on the blended logits."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """As in validation."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Float[Tensor, "b classes i j k"]:
        """Blended logits of every volume; no label is needed."""
        return self._blended(_image(batch), self.window, self.overlap)

    def predict_volume(
        self,
        image: Float[Tensor, "c i j k"],
        window: int | Sequence[int] | None = None,
        overlap: float | None = None,
    ) -> Float[Tensor, "classes i j k"]:
        """Logits of a whole volume, blended from sliding windows; evaluation mode, no gradient.

        Placement and Gaussian weights are those of `Windows`; logits are blended, not
        probabilities. A volume shorter than the window is padded at its far end by its last
        voxels.

        Args:
            image: The volume, after the preprocessing of the training.
            window: Voxels of a window, the task's where it is None.
            overlap: Share of a window that the next one covers again, the task's where it is None.
        """
        size = self.window if window is None else as_shape(window, "window")
        modes = {module: module.training for module in self.net.modules()}
        self.net.eval()
        try:
            with torch.no_grad():
                share = self.overlap if overlap is None else overlap
                return self._blended(image[None].to(self.device), size, share)[0]
        finally:
            for module, training in modes.items():
                module.training = training

    def _blended(
        self, x: Float[Tensor, "b c i j k"], window: tuple[int, int, int] | None, overlap: float
    ) -> Float[Tensor, "b classes i j k"]:
        shape = (x.shape[2], x.shape[3], x.shape[4])
        if window is None:
            return self._logits(x)
        windows = Windows(shape, window, overlap)
        blended: Tensor | None = None
        for place in windows.places:
            crop = x[(..., *place)]
            i, j, k = crop.shape[2:]
            short = (0, window[2] - k, 0, window[1] - j, 0, window[0] - i)
            if any(short):
                crop = F.pad(crop, short, "replicate")
            logits = self._logits(crop)[..., :i, :j, :k]
            # float32 or better, as the shares sum to one only to rounding
            share = windows.share(place, torch.promote_types(logits.dtype, torch.float32))
            if blended is None:
                blended = x.new_zeros((*logits.shape[:2], *shape), dtype=share.dtype)
            blended[(..., *place)] += logits * share.to(logits.device)
        assert blended is not None  # Windows has at least one place
        return blended

    def _logits(self, x: Float[Tensor, "b c i j k"]) -> Float[Tensor, "b classes i j k"]:
        return finest(self.net(x), x.shape[2:], self.net)

    def _evaluate(self, batch: Any, stage: Literal["val", "test"]) -> None:
        image, label = _image(batch), _label(batch)
        logits = self._blended(image, self.window, self.overlap)
        loss = self.loss(logits, label)
        self.log(f"{stage}_loss", loss, batch_size=len(image), prog_bar=True, sync_dist=True)
        classes = max(2, logits.shape[1])
        found = logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(dim=1)
        pairs = [
            (predicted == c, truth == c)
            for predicted, truth in zip(found.cpu(), label[:, 0].cpu(), strict=True)
            for c in range(1, classes)
        ]
        for name, score in (("dice", dice), ("cldice", cldice)):
            scores = [s for s in (score(*pair) for pair in pairs) if s is not None]
            # a weight of zero keeps the key, and the ranks of DDP, together where nothing counts
            mean = sum(scores) / max(1, len(scores))
            self.log(f"{stage}_{name}", mean, batch_size=len(scores), prog_bar=True, sync_dist=True)


def dice(found: Bool[Tensor, "i j k"], truth: Bool[Tensor, "i j k"]) -> float | None:
    r"""Dice's coefficient of two masks, $2 |P \cap T| / (|P| + |T|)$, None where both are empty.

    >>> dice(torch.tensor([[[True, True]]]), torch.tensor([[[True, False]]]))
    0.6666666666666666
    """
    both = int(found.sum()) + int(truth.sum())
    return 2 * int((found & truth).sum()) / both if both else None


def cldice(found: Bool[Tensor, "i j k"], truth: Bool[Tensor, "i j k"]) -> float | None:
    r"""Centerline Dice of two masks, None where both are empty and 0 where one of them is.

    $$clDice = \frac{2 \, p \, s}{p + s}, \quad p = \frac{|S_P \cap T|}{|S_P|}, \quad
    s = \frac{|S_T \cap P|}{|S_T|}$$

    with the skeletons $S$ of Lee et al.: the harmonic mean of how much of the predicted
    centerline lies in a vessel and how much of the true one was found.

    References:
        Shit et al., "clDice: a novel topology-preserving loss function for tubular structure
        segmentation", CVPR 2021, arXiv:2003.07311.
    """
    p, t = found.numpy(), truth.numpy()
    if not (p.any() and t.any()):
        return 0.0 if p.any() or t.any() else None
    precision = t[_skeleton(p)].mean()
    sensitivity = p[_skeleton(t)].mean()
    total = precision + sensitivity
    return float(2 * precision * sensitivity / total) if total else 0.0


def _skeleton(mask: Bool[np.ndarray, "i j k"]) -> Bool[np.ndarray, "i j k"]:
    """Centerline voxels; a piece that thinning removes altogether is its own centerline."""
    # a margin: at the border of the volume thinning has no outside to work from
    thin = skeletonize(np.pad(mask, 1), method="lee")[1:-1, 1:-1, 1:-1].astype(bool)
    # scikit-image 0.26 leaves nothing of a cube of 2 voxels, say
    pieces, _ = label_pieces(mask, structure=np.ones((3, 3, 3)))
    lost = mask & ~np.isin(pieces, np.unique(pieces[thin]))
    return thin | lost


def _image(batch: Any) -> Float[Tensor, "b c i j k"]:
    image = _entry(batch, "image")
    return image if image.is_floating_point() else image.float()


def _label(batch: Any) -> Int[Tensor, "b 1 i j k"]:
    return _entry(batch, "label").long()


def _entry(batch: Any, name: str) -> Tensor:
    try:
        data: Tensor = batch[name]["data"]
    except (KeyError, TypeError, IndexError):
        found = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f'`SegmentationTask` needs batch["{name}"]["data"], as TorchIO makes them, but got '
            f'{found}. Name the images of a subject "image" and "label", or use `MRADataModule`.'
        ) from None
    return data
