"""Losses of DS6: focal Tversky, and the weighted sum over the heads of a supervised network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn


class FocalTverskyLoss(nn.Module):
    r"""One minus the Tversky index, to a power that weighs hard batches.

    $$TI = \frac{TP + s}{TP + \alpha FN + \beta FP + s}, \qquad L = (1 - TI)^\gamma$$

    in [0, 1], with soft counts ``TP = sum(p y)``, ``FN = sum((1 - p) y)``, ``FP = sum(p (1 - y))``
    over all voxels of the batch, as in DS6, so that a patch without vessels only adds its false
    positives. One channel goes through a sigmoid and class 1 is the vessel; more go through a
    softmax, and the loss is the mean over the classes but class 0. With ``alpha = beta = 0.5`` and
    ``gamma = 1`` it is the soft Dice loss. Computed in float32 or better, whatever autocast says.

    Args:
        alpha: Weight of what is missed.
        beta: Weight of what is wrongly found.
        gamma: Exponent; below 1, the gradient stays large close to the optimum. It is ``1 / gamma``
            in Abraham & Khan.
        smooth: Added to both sides of the fraction, in voxels.

    Raises:
        ValueError: for a negative weight, a gamma or smooth that is not positive; in ``forward``
            for a label of another shape, or with a class that the logits do not have; in
            `between` for two shapes.

    References:
        Salehi et al., "Tversky loss function for image segmentation using 3D fully convolutional
        deep networks", 2017, arXiv:1706.05721.
        Abraham & Khan, "A novel focal Tversky loss function with improved attention U-Net for
        lesion segmentation", 2019, arXiv:1810.07842.
    """

    def __init__(
        self, alpha: float = 0.7, beta: float = 0.3, gamma: float = 0.75, smooth: float = 1.0
    ) -> None:
        super().__init__()
        if alpha < 0 or beta < 0:
            raise ValueError(
                f"`FocalTverskyLoss(alpha={alpha}, beta={beta})` needs weights of at least 0."
            )
        if gamma <= 0 or smooth <= 0:
            raise ValueError(
                f"`FocalTverskyLoss(gamma={gamma}, smooth={smooth})` needs both above 0."
            )
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.smooth = smooth

    def forward(
        self, logits: Float[Tensor, "b classes i j k"], label: Integer[Tensor, "b ..."]
    ) -> Float[Tensor, ""]:
        """The loss of one tensor of logits against the class of every voxel."""
        classes = _classes(logits, label)
        found = foreground(logits)
        truth = torch.stack([classes == c for c in range(1, found.shape[1] + 1)], dim=1)
        return self.between(found, truth.to(found.dtype))

    def between(
        self, found: Float[Tensor, "b classes i j k"], truth: Float[Tensor, "_ _ _ _ _"]
    ) -> Float[Tensor, ""]:
        """The loss of probabilities against a truth of probabilities, both without background.

        Gradients flow to both. Against a truth that is not sure the least is not 0: for
        ``p = y = 1/2`` everywhere, a half of what is there counts as missed.

        Raises:
            ValueError: for two shapes.
        """
        if found.shape != truth.shape:
            raise ValueError(
                f"`FocalTverskyLoss.between` needs two tensors of one shape, but got "
                f"{tuple(found.shape)} and {tuple(truth.shape)}."
            )
        dtype = torch.promote_types(found.dtype, torch.float32)
        found, truth = found.to(dtype), truth.to(dtype)
        voxels = (0, 2, 3, 4)
        hit = (found * truth).sum(voxels)
        error = self.alpha * ((1 - found) * truth).sum(voxels)
        error = error + self.beta * (found * (1 - truth)).sum(voxels)
        # 1 - TI without its cancellation; below 1 the power's slope at 0 is infinite, and infinity
        # times a saturated sigmoid's slope of 0 would be NaN: the clamp makes that gradient 0
        missing = error / (hit + error + self.smooth)
        return missing.clamp_min(1e-12).pow(self.gamma).mean()


class DeepSupervision(nn.Module):
    r"""A weighted sum of a loss over several outputs of a network.

    $$L(o, y) = \sum_l w_l \, \ell(\mathrm{up}(o_l), y)$$

    where ``up`` is the nearest upsampling to the label's size. A single output, as a network
    gives in evaluation, has the first weight; so the loss in training is not to be compared with
    the one in validation.

    Args:
        loss: Takes logits and label.
        weights: Weights of the outputs, the full resolution first; there may be fewer outputs.

    Raises:
        ValueError: in ``forward``, for more outputs than weights.

    References:
        Chatterjee et al., "DS6, Deformation-Aware Semi-Supervised Learning: Application to Small
        Vessel Segmentation with Noisy Training Data", J. Imaging 8(10):259, 2022.
    """

    def __init__(self, loss: nn.Module, weights: Sequence[float] = (1.0, 0.66, 0.34)) -> None:
        super().__init__()
        self.loss = loss
        self.weights = tuple(weights)

    def forward(self, outputs: Any, label: Integer[Tensor, "b ..."]) -> Float[Tensor, ""]:
        """The loss of what a network returned, see `heads`."""
        several = heads(outputs)
        if len(several) > len(self.weights):
            raise ValueError(
                f"`DeepSupervision(weights={self.weights})` has {len(self.weights)} weights, "
                f"but the network returned {len(several)} outputs. Give a weight for each."
            )
        losses = []
        for level, (weight, logits) in enumerate(zip(self.weights, several, strict=False)):
            if level:  # never the full resolution: its size must be the label's
                logits = F.interpolate(logits, size=label.shape[-3:], mode="nearest")
            losses.append(weight * self.loss(logits, label))
        return torch.stack(losses).sum()


def heads(outputs: Any) -> tuple[Float[Tensor, "b classes _ _ _"], ...]:
    """The outputs of a network as tensors, the first of them at full resolution.

    A tensor is one output, unless it has six axes: then MONAI has stacked them along the second.
    Tuples, lists and the values of dicts are taken in their order.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(outputs, Tensor) and outputs.ndim in (5, 6):
        return (outputs,) if outputs.ndim == 5 else outputs.unbind(dim=1)
    several = tuple(outputs.values()) if isinstance(outputs, Mapping) else outputs
    if (
        isinstance(several, tuple | list)
        and several
        and all(isinstance(logits, Tensor) and logits.ndim == 5 for logits in several)
    ):
        return tuple(several)
    found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    raise TypeError(
        "A network needs to return logits of five axes (b classes i j k), or a tuple, list or "
        f"dict of such tensors, but returned {found}. Wrap it in a module that does."
    )


def finest(outputs: Any, shape: Sequence[int], net: nn.Module) -> Float[Tensor, "b classes i j k"]:
    """The first of a network's outputs that has the size of its input.

    Args:
        outputs: See `heads`.
        shape: Voxels of the input.
        net: What gave the outputs, for the error.

    Raises:
        ValueError: where no output has that size.
    """
    several = heads(outputs)
    for logits in several:
        if logits.shape[2:] == torch.Size(shape):
            return logits
    raise ValueError(
        "A segmentation needs a network whose logits have the size of its input, "
        f"{tuple(shape)}, but `{type(net).__name__}` returned "
        f"{', '.join(str(tuple(logits.shape[2:])) for logits in several)}."
    )


def foreground(logits: Float[Tensor, "b channels i j k"]) -> Float[Tensor, "b classes i j k"]:
    """Probabilities of the classes but the background, in float32 or better.

    >>> foreground(torch.zeros(1, 1, 1, 1, 1)).flatten().tolist()
    [0.5]
    >>> foreground(torch.zeros(1, 4, 1, 1, 1)).flatten().tolist()
    [0.25, 0.25, 0.25]
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)[:, 1:]


def _classes(logits: Tensor, label: Tensor) -> Tensor:
    """The label as b i j k, checked against the logits."""
    classes = label[:, 0] if label.ndim == 5 and label.shape[1] == 1 else label
    if classes.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"`FocalTverskyLoss` got logits of shape {tuple(logits.shape)} and a label of "
            f"{tuple(label.shape)}, but needs a label of shape b i j k or b 1 i j k. "
            "Several outputs of different sizes go through `DeepSupervision`."
        )
    known = max(2, logits.shape[1])
    if int(classes.max()) >= known or int(classes.min()) < 0:
        raise ValueError(
            f"`FocalTverskyLoss` got {logits.shape[1]} channels of logits, hence needs a label of "
            f"classes 0 to {known - 1}, but found {int(classes.min())} to {int(classes.max())}. "
            "Remap the label, or give the network more channels."
        )
    return classes
