"""The promises of CONTRIBUTING: a loss, a backbone and a data set added as it says, by its code."""

import re
import shlex
import shutil
import subprocess
import sys

from tests.conftest import ROOT, make_folder

MINE = '''
class Mine(nn.Module):
    """Softmax over cosines to proxies, less a margin for the image's own class."""

    def __init__(self, num_classes, embedding_size, margin):
        super().__init__()
        self.margin = margin
        self.proxies = nn.Parameter(torch.randn(num_classes, embedding_size))

    def forward(self, embeddings, labels):
        cosines = F.normalize(embeddings) @ F.normalize(self.proxies).T
        own = F.one_hot(labels, len(self.proxies))
        return F.cross_entropy(16 * (cosines - self.margin * own), labels)


'''
SHALLOW = '''
class Shallow(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 5, stride=4)

    def forward(self, x):
        return self.conv(x).relu()


'''
TRAIN = (
    "train.py --loss Mine --model shallow --dataset flowers_of_the_test --weights none "
    "--image-size 32 --batch-size 8 --embedding-size 8 --epochs 1 --workers 0 --wandb disabled "
    "--disent True --al 1 --be 0.1 --gam 1e-5"
)


def add(file, table, line, definition=""):
    """A line in a table, and above the table what the line names."""
    text, count = re.subn(f"^{table} = {{.*\n", rf"{definition}\g<0>    {line}", file.read_text(),
                          flags=re.M)  # fmt: skip
    assert count == 1
    file.write_text(text)


def test_a_loss_a_backbone_and_a_data_set_are_added_as_contributing_says(tmp_path):
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*/*.html"),
                 ROOT / "pyproject.toml"]:  # fmt: skip
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    text = (ROOT / "CONTRIBUTING.md").read_text().replace("flowers", "flowers_of_the_test")
    loss, backbone, file, line = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    add(tmp_path / "losses.py", "LOSSES", loss, MINE)
    add(tmp_path / "net/backbones.py", "BACKBONES", backbone, SHALLOW)
    add(tmp_path / "dataset/__init__.py", "DATASETS", line)
    (tmp_path / file.split()[1]).write_text(file)
    make_folder(tmp_path / "data/flowers_of_the_test/images")

    def run(command):
        command = [sys.executable, *shlex.split(command)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("-m ruff check .")
    tests = "tests/test_losses.py tests/test_net.py tests/test_precision.py"
    said = run(f"-m pytest -v {tests} -k 'Mine or shallow'")
    assert said.count("test_losses.py") > 5 and "[shallow]" in said and "--loss Mine" in said
    assert "R@8" in run(TRAIN)
