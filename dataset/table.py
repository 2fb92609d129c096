"""A list of one's own: FILE.csv or FILE.tsv with the columns path, label and, if wanted, split."""

import csv
import os
from pathlib import Path

from dataset.files import halves, on_disk, require_size
from utils import UserError, plural

SUFFIXES = (".csv", ".tsv")
KS = (1, 2, 4, 8)
OWN = "dataset"  # the flag that says which images
SPLITS = ({"train", "test"}, {"train", "query", "gallery"})


def read(file, all_there=True):
    """Paths are relative to the file. Without a split, the first half of the labels trains."""
    file = Path(file)
    try:
        require_size(file)
        with open(file, encoding="utf-8-sig", newline="") as text:
            rows = csv.DictReader(text, delimiter="\t" if file.suffix.lower() == ".tsv" else ",",
                                  strict=True)  # fmt: skip
            splits, line_of = parse(file, rows)
    except FileNotFoundError:
        raise UserError(f"--dataset {file}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: not a list that can be read; save it as text in UTF-8 ({error})"
        ) from error
    _, missing = on_disk([item for items in splits.values() for item in items])
    if missing and all_there:
        such_as = ", ".join(f"line {line_of[path]} {path}" for path in missing[:5])
        raise UserError(f"{file}: {plural(len(missing), 'listed file')} not there: {such_as}; "
                        "correct the path, or delete the line")  # fmt: skip
    return halves(splits[""], file) if "" in splits else splits


def parse(file, rows):
    """{split: [(path, label)]}, the split "" where there is no such column, and {path: line}."""
    splits, line_of = {}, {}

    def refuse(reason):
        raise UserError(f"{file}, line {rows.line_num}: {reason}")

    try:
        columns = rows.fieldnames or []
        if not {"path", "label"} <= set(columns) or len({*columns}) < len(columns):
            refuse(
                f"the header must name the columns path, label and, if wanted, split, with "
                f"{'tabs' if file.suffix.lower() == '.tsv' else 'commas'} between them; it names "
                f"{', '.join(columns) or 'none'}"
            )
        for row in rows:
            if None in row or None in row.values():
                refuse(f"must have {len(columns)} fields, as the header has")
            label, split = row["label"].strip(), row.get("split", "").strip()
            if not row["path"] or not label:
                refuse("the path or the label is empty; fill it in, or delete the line")
            if "split" in row and not any(split in allowed for allowed in SPLITS):
                refuse(f"the split is {split!r}, must be train, test, query or gallery")
            path = inside(file.parent, row["path"])
            if path is None:
                refuse(f"{row['path']} is not below {file.parent}; keep the list above its images")
            if path in line_of:
                refuse(f"{row['path']} is in line {line_of[path]} already; delete one of them")
            line_of[path] = rows.line_num
            splits.setdefault(split, []).append((path, label))
    except csv.Error as error:  # nobody knows where a quote should have ended
        raise UserError(f"{file}, after line {rows.line_num}: {error}; check its quotes") from error
    if not splits:
        refuse("no images follow; a line names one, as in `birds/wren 1.jpg,wren`")
    if "" not in splits and not any(splits.keys() <= allowed for allowed in SPLITS):
        raise UserError(f"{file}: has the splits {', '.join(splits)}; use train and test, or "
                        "train, query and gallery")  # fmt: skip
    return splits, line_of


def inside(folder, path):
    """The path of a file below `folder`, given as it is or relative to it; else None."""
    relative = os.path.relpath(os.path.join(folder.absolute(), path), folder.absolute())
    return None if relative.startswith("..") else os.path.join(folder, relative)
