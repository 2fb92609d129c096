"""Probes: can a linear model read a factor from an embedding, on images it was not fitted on?"""

import csv
import os
import warnings
from pathlib import Path

import numpy as np

from utils import UserError, plural, warn

# Numeric columns with more different values than this are regressed; all others are classified.
FEW = 10


def read_factors(file):
    """{factor: {path: value}} of a list with the column `path`, relative to the list, and a column
    for each factor. A value is a number or the name of a class."""
    file, columns = Path(file), {}
    try:
        with open(file, encoding="utf-8-sig", newline="") as text:
            rows = csv.DictReader(text, strict=True)
            names = rows.fieldnames or []
            if "path" not in names or len(set(names)) < max(2, len(names)):
                raise UserError(f"--factors {file}: the header must name the column path, and a "
                                f"column for each factor; it names {', '.join(names) or 'none'}")
            for row in rows:
                if None in row or None in row.values():
                    raise UserError(f"--factors {file}, line {rows.line_num}: must have "
                                    f"{len(names)} fields, as the header has")  # fmt: skip
                path = os.path.abspath(file.parent / row.pop("path"))
                for name, value in row.items():
                    columns.setdefault(name, {})[path] = value
    except FileNotFoundError:
        raise UserError(f"--factors {file}: no such file") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"--factors {file}: not a list; save it as text in UTF-8, with commas "
                        f"({error})") from error  # fmt: skip
    return {name: as_numbers(column) for name, column in columns.items()}


def as_numbers(column):
    """{path: float} if all values are numbers and more than FEW are different; else the column."""
    try:
        numbers = {path: float(value) for path, value in column.items()}
    except ValueError:
        return column
    values = set(numbers.values())
    return numbers if len(values) > FEW and np.isfinite(list(values)).all() else column


def factors_of(factors, paths, side):
    """{factor: values [N]} of the images `paths`; UserError if one has no row. A factor that cannot
    be probed on these images is left out, with a warning."""
    chosen, absolute = {}, [os.path.abspath(path) for path in paths]
    for name, column in factors.items():
        missing = [path for path, key in zip(paths, absolute) if key not in column]
        if missing:
            raise UserError(f"--factors: no row for {len(missing):,} of the {len(paths):,} {side} "
                            f"images, such as {missing[0]}; a path is relative to the list")
        values = np.array([column[key] for key in absolute])
        count = len(np.unique(values))
        if count == 1 or is_class(values) and count > len(values) / 2:
            warn(f"--factors: {name} has {plural(count, 'value')} in {len(values):,} {side} images,"
                 " so it cannot be probed there")  # fmt: skip
        else:
            chosen[name] = values
    return chosen


def is_class(values):
    return values.dtype.kind != "f"


def halves(values):
    """(fitted, held out): indices of the images, sorted by value and at random within a value, and
    taken alternately, so that both halves have each value equally often."""
    codes = np.unique(values, return_inverse=True)[1]
    order = np.lexsort((np.random.default_rng(0).random(len(values)), codes))
    return order[::2], order[1::2]


def probe(features, values):
    """Per cent on held-out images, from standardised features [N, F]. Classes: the accuracy of
    scikit-learn's logistic regression; numbers: the R^2 of its ridge regression, with the penalty
    chosen on the fitted images."""
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted, held_out = halves(values)
    classes, numbers = LogisticRegression(max_iter=1000), RidgeCV(np.logspace(-1, 5, 13))
    model = make_pipeline(StandardScaler(), classes if is_class(values) else numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence that misses the last digits
        model.fit(features[fitted], values[fitted])
    return 100 * float(model.score(features[held_out], values[held_out]))


def chance(values):
    """What `probe` scores without features: by the most frequent class, or the mean number."""
    if not is_class(values):
        return 0.0
    fitted, held_out = halves(values)
    names, counts = np.unique(values[fitted], return_counts=True)
    return 100 * float((values[held_out] == names[counts.argmax()]).mean())


def probes(features, factors, side):
    """[{"of", "side", "kind", "chance", and a score for each of `features`}], a row for each factor
    of {name: values [N]}; features: {name: [N, F]}."""
    return [
        {"of": name, "side": side, "kind": "class" if is_class(values) else "number",
         "chance": chance(values), **{what: probe(x, values) for what, x in features.items()}}
        for name, values in factors.items()
    ]  # fmt: skip
