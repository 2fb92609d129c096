"""In-Shop Clothes Retrieval (Liu et al., DeepFashion, 2016): 7,982 items, queries and a gallery."""

from dataset.files import below, first_existing, parse_list

KS = (1, 10, 20, 30, 40, 50)
# images, classes
PUBLISHED = {"train": (25882, 3997), "query": (14218, 3985), "gallery": (12612, 3985)}
SOURCE = "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html"
FILES = {  # we know of no published MD5
    "Inshop_Clothes/Img/img.zip": (None, None),
    "Inshop_Clothes/Eval/list_eval_partition.txt": (None, None),
}


def read(root):
    """Images are in the list's order. `Img/` is beside the list's folder."""
    file = first_existing(root, ("Inshop_Clothes/Eval/list_eval_partition.txt",), "Inshop")

    def parse(path, item, split):
        if split not in PUBLISHED:
            raise ValueError(f"the split is {split}")
        return split, (below(file.parent.parent / "Img", path), item)

    listed = parse_list(file, parse, "image_name item_id evaluation_status", header=2)
    return {split: [item for part, item in listed if part == split] for split in PUBLISHED}
