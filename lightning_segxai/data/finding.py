"""Where subjects lie: a table, a folder of pairs, or a BIDS folder."""

from __future__ import annotations

from pathlib import Path

from lightning_segxai.data.bids import bids_subjects
from lightning_segxai.data.sources import SubjectFiles
from lightning_segxai.data.subjects import ENDINGS, absence, file_stem
from lightning_segxai.data.tables import table_subjects
from lightning_segxai.values import checked_name


def find_subjects(root: str | Path) -> list[SubjectFiles]:
    """The volumes of a table, a folder of pairs or a BIDS folder; only file names are looked at.

    * A ``.csv`` file: columns ``image``, ``label``, ``split`` and ``subject``, and where wanted
      ``name``, ``weights`` and ``map_<name>`` for further label maps, in capitals or small
      letters; any other is metadata. Paths are relative to the table's folder, or absolute.
    * A folder: ``images/<name>`` and ``labels/<name>``, with any ending of a volume, or none for
      the folder of a DICOM series.
    * A BIDS folder: ``sub-*[/ses-*]/anat/*_angio.nii.gz``, and anywhere below ``derivatives/``
      ``*_desc-vessel_mask.nii.gz`` of the same entities, which becomes the label, and
      beside it ``*_desc-brain_mask.nii.gz``, which becomes the map ``brain``. Columns of
      ``participants.tsv`` are metadata, except ``split``, which is the split; its
      ``participant_id`` may lack the ``sub-``.

    Endings may be in capitals. Whether images and labels are there, and are any good, is not
    looked at yet.

    Raises:
        ValueError: for any other root, and once for all that is wrong with it: labels that stand
            alone, masks that are there twice, names that are bad or given twice, participants of
            whom none has an image.
    """
    root = Path(root).expanduser()
    if root.is_file() and root.suffix.lower() == ".csv":
        return table_subjects(root)
    if (root / "images").is_dir():
        return _paired_subjects(root)
    if any(path.is_dir() for path in root.glob("sub-*")):
        return bids_subjects(root)
    found = absence(root) or "is a file"
    if root.is_dir():
        held = sorted(path.name for path in root.iterdir())
        found = "holds " + (", ".join(held[:10]) + ", ..." * (len(held) > 10) or "nothing")
    raise ValueError(
        f"The subjects' root must be a table (.csv), a folder with images/ and labels/, or a BIDS "
        f"folder with sub-*/, but {root} {found}."
    )


def _paired_subjects(root: Path) -> list[SubjectFiles]:
    images, labels = (_volumes(root, folder) for folder in ("images", "labels"))
    lonely = [str(labels[name]) for name in sorted(labels.keys() - images.keys())]
    if lonely:
        raise ValueError(
            f"{root} needs an image for every label, under the same name, but these stand alone: "
            f"{', '.join(lonely)}."
        )
    # A label that is not there is told with all else that is wrong with the subjects
    expected = {name: labels.get(name, root / "labels" / f"{name}.nii.gz") for name in images}
    return [SubjectFiles(str(images[n]), str(expected[n]), name=n) for n in sorted(images)]


def _volumes(root: Path, folder: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    where = root / folder
    for path in sorted(where.iterdir()) if where.is_dir() else []:
        # A leading dot is a Mac's or an editor's shadow of a file
        if path.name.startswith(".") or not (path.is_dir() or path.name.lower().endswith(ENDINGS)):
            continue
        name = checked_name(file_stem(path), "subject")
        if name in found:
            raise ValueError(f"{path} and {found[name]} are both {name!r}. Keep one of them.")
        found[name] = path
    if not found:
        state = "holds none" if where.is_dir() else "does not exist"
        raise ValueError(
            f"{root} needs volumes as {folder}/<name>.nii.gz (or {', '.join(ENDINGS[1:])}, or a "
            f"folder with a DICOM series), but {where} {state}."
        )
    return found
