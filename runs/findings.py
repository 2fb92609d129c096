"""What --diagnose and --calibrate of evaluate.py share: checks, and where findings are written."""

from pathlib import Path

from distributed import world_size
from retrieval.page import add_to_page
from storage import write_atomically
from utils import UserError


def check_findings(args, sources):
    for flag, detail in {"diagnose": "factors", "calibrate": "fmr"}.items():
        if not getattr(args, flag):
            if getattr(args, detail) is not None:
                raise UserError(f"--{detail}: needs --{flag}")
        elif len(sources) > 1:
            raise UserError(f"--{flag}: takes one network; name one checkpoint")
        elif world_size() > 1:
            raise UserError(f"--{flag}: runs in one process; start it without torchrun")


def show_finding(what, path, epoch, lines, draw, page=None):
    """Print the lines found for a checkpoint. Write its picture, draw(title=), beside the
    checkpoint, on the page of its run, and on `page`."""
    path = Path(path)
    title = f"{what.capitalize()} of {path.name}" + ("" if epoch is None else f", epoch {epoch}")
    picture = draw(title=title)
    print("\n".join(lines))
    drawn = path.with_name(f"{path.stem}_{what}.png")
    write_atomically(drawn, picture)
    print(f"{drawn}: the same as a picture")
    pages = [path.with_name("page.html"), *([page] if page else [])]
    for file in filter(Path.exists, {Path(each).resolve() for each in pages}):
        write_atomically(file, add_to_page(file.read_bytes(), title, lines, picture))
