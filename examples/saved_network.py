"""Pictures compared by what evaluate.py --save-model wrote; copy it, it needs nothing else of DDML:

python saved_network.py network.onnx A.jpg B.jpg C.jpg
"""

import runpy
import sys
from pathlib import Path

import numpy as np

file, *paths = sys.argv[1:]
network = Path(file)
load = runpy.run_path(str(network.with_name(f"{network.stem}_input.py")))["load"]

if network.suffix == ".onnx":
    import onnxruntime

    session = onnxruntime.InferenceSession(file)

    def embed(pixels):
        return session.run(None, {"pixels": pixels})[0]
else:
    import torch

    module = torch.export.load(file).module()

    def embed(pixels):
        return module(torch.from_numpy(pixels)).detach().numpy()


embeddings = np.concatenate([embed(load(path)) for path in paths])  # [N, d], L2-normalised
np.save("embeddings.npy", embeddings)
for path, cosine in zip(paths, embeddings @ embeddings[0]):
    print(f"{cosine:.4f}  {path}")
