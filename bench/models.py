"""Makes what mounts are measured with: ``python -m bench.models DIRECTORY BYTES LAYERS COUNT…``.

DIRECTORY becomes a bucket: ``big/model.safetensors`` of about BYTES, ``bert/`` with LAYERS layers (12 are
BERT base, 438 MB), and for each COUNT a directory ``files-COUNT/`` of so many small files.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

MIB = 1 << 20
TENSOR = 8 * MIB


def main() -> None:
    directory = Path(sys.argv[1])
    size, layers, *counts = map(int, sys.argv[2:])
    for name in ("big", "bert", *(f"files-{count}" for count in counts)):
        (directory / name).mkdir(parents=True)
    big(directory / "big" / "model.safetensors", size)
    bert(directory / "bert", layers)
    for count in counts:
        many(directory / f"files-{count}", count)


def big(path: Path, size: int) -> None:
    """Write a safetensors file of whole tensors of 8 MiB, incompressible, no two MiB alike."""
    count = size // TENSOR
    layout = {
        f"layers.{index:04}.weight": {
            "dtype": "F32",
            "shape": [TENSOR // 4096, 1024],
            "data_offsets": [index * TENSOR, (index + 1) * TENSOR],
        }
        for index in range(count)
    }
    head = json.dumps(layout).encode()
    head += b" " * (-len(head) % 8)
    noise = os.urandom(MIB)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for index in range(count * TENSOR // MIB):
            file.write(index.to_bytes(8, "little") + noise[8:])


def bert(directory: Path, layers: int) -> None:
    """Write a BERT base with `layers` layers and random weights, as ``save_pretrained`` does."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(BertConfig(num_hidden_layers=layers)).save_pretrained(directory)
    for path in directory.iterdir():
        path.chmod(0o644)  # the origin is another user


def many(directory: Path, count: int) -> None:
    """Write `count` small files, a hundred to a directory."""
    for index in range(count):
        parent = directory / f"part-{index // 100:04}"
        if index % 100 == 0:
            parent.mkdir()
        (parent / f"file-{index:06}.json").write_text(f'{{"index": {index}}}\n')


if __name__ == "__main__":
    main()
