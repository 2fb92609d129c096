"""Stanford Online Products (Oh Song et al., 2016): 22,634 products, lists for train and test."""

from cli import UserError
from dataset.files import first_existing, on_disk, require_size

KS = (1, 10, 100, 1000)
PUBLISHED = {"train": (59551, 11318), "test": (60502, 11316)}  # images, classes


def read(root, split):
    """([(path, label)], [missing path]) in the list's order. Test labels are the list's, counted
    from 0."""
    file = f"Ebay_{split}.txt"
    file = first_existing(root, (f"Stanford_Online_Products/{file}", f"sop/{file}"), "SOP")
    try:
        require_size(file)
        header, *lines = file.read_text().splitlines()
        if "image_id" not in header:
            raise ValueError("the header is missing")  # the first image would be taken for it
        rows = [line.split() for line in lines if line.strip()]
        items = [(path, int(class_id) - 1) for _, class_id, _, path in rows]
        if not all(0 <= label < 2**31 for _, label in items):
            raise ValueError("class ids are counted from 1")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: each line after the header must be `image_id class_id super_class_id path` "
            f"({error})"
        ) from error
    items, missing = on_disk(file.parent, items, file)
    if split == "test":
        return items, missing
    classes = {label: index for index, label in enumerate(sorted({label for _, label in items}))}
    return [(path, classes[label]) for path, label in items], missing
