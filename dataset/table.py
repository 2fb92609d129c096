"""A user's own list: FILE.csv or FILE.tsv with the columns path, label and, if wanted, split."""

import csv
import os
from pathlib import Path

from dataset.files import found_and_missing, halves
from utils import UserError, plural

SUFFIXES = (".csv", ".tsv")
KS = (1, 2, 4, 8)
OWN = "dataset"  # the flag that says where they are
SPLITS = ({"train", "test"}, {"train", "query", "gallery"})


def read(file):
    """Paths are relative to the file. Without a split, the first half of the labels trains."""
    file = Path(file)
    splits, line_of = parse_file(file, ("path", "label"))
    _, missing = found_and_missing([(path, "") for path in line_of])
    if missing:
        such_as = ", ".join(f"line {line_of[path]} {path}" for path in missing[:5])
        raise UserError(f"{file}: {plural(len(missing), 'listed file')} not there: {such_as}; "
                        "correct the path, or delete the line")  # fmt: skip
    return halves(splits[""], file) if "" in splits else splits


def read_gallery(file):
    """[(path, label or "")] of a list. It needs no labels, and its files may be missing."""
    splits, _ = parse_file(Path(file), ("path",))
    return [item for items in splits.values() for item in items]


def parse_file(file, needed):
    """As `parse`; `needed`: the columns that the list must have."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as text:
            return parse(file, text, needed)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a list; save it as text in UTF-8 ({error})") from error


def parse(file, text, needed):
    """({split: [(path, label)]}, {path: its line}); the split is "" without that column."""
    splits, line_of = {}, {}
    folder = os.path.join(os.path.abspath(file.parent), "")
    delimiter, name = ("\t", "tabs") if file.suffix.lower() == ".tsv" else (",", "commas")
    rows = csv.DictReader(text, delimiter=delimiter, strict=True)

    def refuse(reason):
        raise UserError(f"{file}, line {rows.line_num}: {reason}")

    try:
        columns = rows.fieldnames or []
        if not {*needed} <= {*columns} or len({*columns}) < len(columns):
            optional = "split" if "label" in needed else "label"
            refuse(f"the header must name the columns {', '.join(needed)} and, if wanted, "
                   f"{optional}, with {name} between them; it names "
                   f"{', '.join(columns) or 'none'}")  # fmt: skip
        for row in rows:
            if None in row or None in row.values():
                refuse(f"must have {len(columns)} fields, as the header has")
            label, split = (row.get(column, "").strip() for column in ("label", "split"))
            if not all(row[column].strip() for column in needed):
                refuse(f"the {' or the '.join(needed)} is empty; fill it in, or delete the line")
            if "split" in row and not any(split in allowed for allowed in SPLITS):
                refuse(f"the split is {split!r}, must be train, test, query or gallery")
            path = os.path.normpath(os.path.join(folder, row["path"]))
            if not path.startswith(folder):
                refuse(f"{row['path']} is not below {file.parent}; keep the list above its images")
            path = os.path.join(file.parent, path.removeprefix(folder))
            if path in line_of:
                refuse(f"{row['path']} is in line {line_of[path]} already; delete one of them")
            line_of[path] = rows.line_num
            splits.setdefault(split, []).append((path, label))
    except csv.Error as error:  # a missing quote is found at the end of the file, not at its line
        raise UserError(f"{file}, after line {rows.line_num}: {error}; check its quotes") from error
    if not splits:
        refuse("no images follow; a line names one, as in `birds/wren 1.jpg,wren`")
    if "" not in splits and not any(splits.keys() <= allowed for allowed in SPLITS):
        raise UserError(f"{file}: has the splits {', '.join(splits)}; use train and test, or "
                        "train, query and gallery")  # fmt: skip
    return splits, line_of
