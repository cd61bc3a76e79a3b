"""Who is trained, validated and tested on: always whole subjects, always the same for a seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_segxai.data.sources import Source, SubjectFiles

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def assign_splits(
    sources: Sequence[Source],
    *,
    validation_share: float,
    test_share: float = 0.0,
    fold: int | None = None,
    folds: int | None = None,
    seed: int,
) -> list[str]:
    """``train``, ``val`` or ``test`` for each source; those of one subject are never parted.

    Where the sources say their splits, these are kept; without a ``val`` among them, the
    ``validation_share`` of the training subjects, drawn by the seed, is validated on. Otherwise
    subjects are put in an order that depends on their names and the seed alone. The first are
    tested on; of the others, the next are validated on, or every ``folds``-th from ``fold`` on.

    Args:
        sources: All of them.
        validation_share: Share of the subjects to validate on, in (0, 1), at least one; folds
            decide themselves.
        test_share: Share of the subjects to test on, in [0, 1), at least one unless it is 0; the
            same ones for every fold.
        fold: Which of the folds to validate on, from 0.
        folds: Into how many parts to divide the subjects that are not tested on.
        seed: Another seed gives another order.

    Raises:
        ValueError: for numbers out of range, too few subjects, names given twice, and splits that
            are incomplete, unknown, without training, or divide a subject.
    """
    check_shares(validation_share, test_share, fold, folds)
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Each volume needs a name of its own, but several are {_listed(twice)}.")
    if any(source.split for source in sources):
        if folds is not None or test_share:
            asked = f"test_share={test_share}" if folds is None else f"fold={fold}, folds={folds}"
            raise ValueError(
                f"`MRADataModule({asked})` cannot be had with volumes that say their own splits. "
                "Take out one of the two."
            )
        return _given(sources, validation_share, seed)
    order = _drawn([source.subject for source in sources], seed)
    least = 2 if folds is None else folds
    tested = _count(test_share, order, len(order) - least) if test_share else 0
    rest = order[tested:]
    if len(rest) < least:
        raise ValueError(
            f"`MRADataModule` needs at least {least} subjects to train and to validate on"
            f"{f', beside {tested} to test on' if tested else ''}, but found {len(order)} in all: "
            f"{_listed(sorted(order))}."
        )
    if fold is None:
        validated = set(rest[: _count(validation_share, order, len(rest) - 1)])
    else:
        validated = set(rest[fold::folds])
    split = dict.fromkeys(order[:tested], "test")
    split |= {subject: "val" if subject in validated else "train" for subject in rest}
    return [split[source.subject] for source in sources]


def split_rows(sources: Sequence[Source], splits: Sequence[str]) -> list[dict[str, str]]:
    """Rows of ``splits.csv``, all with the same columns: the split, the paths, the metadata."""
    extra = list(dict.fromkeys(key for source in sources for key in source.metadata))
    rows = []
    for source, split in zip(sources, splits, strict=True):
        row = {"name": source.name, "subject": source.subject, "split": split}
        image, label = "", None
        if isinstance(source, SubjectFiles):
            image, label = source.image, source.label
        row |= {"image": image, "label": label or ""}
        rows.append(row | {key: source.metadata.get(key, "") for key in extra if key not in row})
    return rows


def check_shares(
    validation_share: float, test_share: float, fold: int | None, folds: int | None
) -> None:
    """Refuse the numbers of `assign_splits` that no subjects can be split by.

    Raises:
        ValueError: for a share out of range, shares that leave nothing to train on, a fold without
            folds or the other way round, fewer than two folds, and a fold that is none of them.
    """
    if not 0 < validation_share < 1:
        raise ValueError(
            f"`MRADataModule(validation_share={validation_share})` must lie between 0 and 1."
        )
    if not 0 <= test_share < 1:
        raise ValueError(f"`MRADataModule(test_share={test_share})` must be 0, or between 0 and 1.")
    if (fold is None) != (folds is None):
        raise ValueError(
            f"`MRADataModule(fold={fold}, folds={folds})` needs both numbers, or neither."
        )
    if fold is not None and folds is not None:
        if folds < 2:
            raise ValueError(f"`MRADataModule(folds={folds})` must be at least 2.")
        if not 0 <= fold < folds:
            raise ValueError(f"`MRADataModule(fold={fold})` must be from 0 to {folds - 1}.")
    elif validation_share + test_share >= 1:
        raise ValueError(
            f"`MRADataModule(validation_share={validation_share}, test_share={test_share})` must "
            "together be less than 1: the rest is trained on."
        )


def _given(sources: Sequence[Source], validation_share: float, seed: int) -> list[str]:
    silent = [source.name for source in sources if not source.split]
    if silent:
        raise ValueError(
            "Either all volumes or none must say their split, but these say none: "
            f"{_listed(silent)}."
        )
    words = {source.name: _WORDS.get(source.split.strip().lower(), "") for source in sources}
    unknown = [f"{s.split!r} of {s.name}" for s in sources if not words[s.name]]
    if unknown:
        raise ValueError(f"A split must be one of {_listed(_WORDS)}, but got {_listed(unknown)}.")
    parts: dict[str, set[str]] = {}
    for source in sources:
        parts.setdefault(source.subject, set()).add(words[source.name])
    divided = [f"{s} ({', '.join(sorted(p))})" for s, p in sorted(parts.items()) if len(p) > 1]
    if divided:
        raise ValueError(
            f"A subject's volumes must all be in one split, but not so those of {_listed(divided)}."
        )
    trained = [subject for subject, part in parts.items() if "train" in part]
    drawn = "val" not in words.values()
    if len(trained) < 1 + drawn:
        needed = "two to train and to validate on" if drawn else "one to train on"
        raise ValueError(
            f"The splits that are said need at least {needed}, but leave "
            f"{_listed(trained) or None}."
        )
    if drawn:
        order = _drawn(trained, seed)
        validated = order[: _count(validation_share, order, len(order) - 1)]
        words |= {source.name: "val" for source in sources if source.subject in validated}
    return [words[source.name] for source in sources]


def _count(share: float, subjects: Sequence[str], most: int) -> int:
    """How many of the subjects a share is: at least one, and else at most so many."""
    return max(1, min(round(share * len(subjects)), most))


def _drawn(subjects: Sequence[str], seed: int) -> list[str]:
    """The distinct subjects in an order that depends on nothing but their names and the seed."""
    distinct = sorted(set(subjects))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))
    return [distinct[n] for n in order.tolist()]


def _listed(names: Sequence[str] | dict[str, str]) -> str:
    return ", ".join(names)
