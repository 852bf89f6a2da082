"""The loaders people use, unmodified, run in a process of their own on a directory of `tests.zoo` models.

``python -m tests.mount.loaders DIRECTORY`` prints one line of JSON per loader as soon as it is done: its
name and a fingerprint of everything it loaded and computed, or why it failed. Nothing here knows about
modelfs: the same lines for two directories mean that the loaders found the same models in both.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TEXTS = ["The bank is strong: profit and growth rise!", "A bad quarter, weak market, loss after loss."]

Loaded = Any
"""Arrays, tensors, texts and numbers, in dictionaries and sequences."""


# -- transformers and sentence-transformers ------------------------------------------------------------


def auto_model(models: Path) -> Loaded:
    from transformers import AutoModel

    return AutoModel.from_pretrained(models / "bert").state_dict()


def auto_model_in_half_precision(models: Path) -> Loaded:
    import torch
    from transformers import AutoModel

    return AutoModel.from_pretrained(models / "bert", dtype=torch.float16).state_dict()


def auto_tokenizer(models: Path) -> Loaded:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "bert")
    return tokenizer(TEXTS)["input_ids"], len(tokenizer)


def classifier(models: Path) -> Loaded:
    return _classify(models / "bert")


def classifier_in_shards(models: Path) -> Loaded:
    return _classify(models / "bert-sharded")


def classifier_from_pytorch_bin(models: Path) -> Loaded:
    return _classify(models / "bert-bin")


def classifier_from_legacy_pytorch_bin(models: Path) -> Loaded:
    return _classify(models / "bert-legacy")


def _classify(directory: Path) -> Loaded:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    with torch.inference_mode():
        return model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits


def pipeline(models: Path) -> Loaded:
    from transformers import pipeline

    return pipeline("text-classification", model=str(models / "bert"))(TEXTS, top_k=None)


def model_with_code_of_its_own(models: Path) -> Loaded:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(models / "custom", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    return model.state_dict()


def sentence_transformer(models: Path) -> Loaded:
    from sentence_transformers import SentenceTransformer

    embeddings = SentenceTransformer(str(models / "minilm"), device="cpu").encode(TEXTS)
    assert embeddings.shape == (2, 384)
    return embeddings


# -- torch and safetensors -----------------------------------------------------------------------------


def torch_load(models: Path) -> Loaded:
    import torch

    return torch.load(models / "bert-bin" / "pytorch_model.bin", weights_only=True)


def torch_load_mapped(models: Path) -> Loaded:
    import torch

    return torch.load(models / "bert-bin" / "pytorch_model.bin", weights_only=True, mmap=True)


def torch_load_legacy(models: Path) -> Loaded:
    import torch

    return torch.load(models / "bert-legacy" / "pytorch_model.bin", weights_only=True)


def safetensors_load_file(models: Path) -> Loaded:
    from safetensors.torch import load_file

    return load_file(models / "bert" / "model.safetensors")


def safetensors_safe_open(models: Path) -> Loaded:
    from safetensors import safe_open

    with safe_open(models / "bert" / "model.safetensors", framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping


def fastsafetensors(models: Path) -> Loaded:
    from fastsafetensors import fastsafe_open

    paths = [str(models / "bert" / "model.safetensors")]
    with fastsafe_open(filenames=paths, nogds=True, device="cpu") as file:
        return {name: file.get_tensor(name).clone().detach() for name in file.keys()}  # noqa: SIM118


def unbuffered_reads_in_threads(models: Path) -> Loaded:
    """Read as fastsafetensors and runai-model-streamer do from disks: O_DIRECT, aligned, 16 at once."""
    path, size = models / "bert" / "model.safetensors", 516 * 1024
    direct = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def part(start: int) -> bytes:
        with mmap.mmap(-1, size) as aligned:
            return bytes(memoryview(aligned)[: os.preadv(direct, [aligned], start)])

    try:
        with ThreadPoolExecutor(16) as threads:
            return b"".join(threads.map(part, range(0, path.stat().st_size, size)))
    finally:
        os.close(direct)


# -- pickle, joblib, numpy -----------------------------------------------------------------------------


def sklearn_pickle(models: Path) -> Loaded:
    with (models / "sklearn" / "best_model.pkl").open("rb") as file:
        return _predict(models, pickle.load(file))


def joblib_load(models: Path) -> Loaded:
    import joblib

    return _predict(models, joblib.load(models / "sklearn" / "model.joblib"))


def joblib_load_mapped(models: Path) -> Loaded:
    import joblib

    return _predict(models, joblib.load(models / "sklearn" / "model.joblib", mmap_mode="r"))


def joblib_load_compressed(models: Path) -> Loaded:
    import joblib

    return _predict(models, joblib.load(models / "sklearn" / "model.compressed.joblib"))


def _predict(models: Path, forest: Any) -> Loaded:
    import numpy

    with (models / "sklearn" / "preprocessor.pkl").open("rb") as file:
        preprocessor = pickle.load(file)
    patients = numpy.random.default_rng(7).normal(size=(100, 13))
    return forest.predict_proba(preprocessor.transform(patients)), forest.feature_importances_


def numpy_load(models: Path) -> Loaded:
    import numpy

    return numpy.load(models / "numpy" / "matrix.npy")


def numpy_load_mapped(models: Path) -> Loaded:
    import numpy

    matrix = numpy.load(models / "numpy" / "matrix.npy", mmap_mode="r")
    assert isinstance(matrix, numpy.memmap)
    return matrix


def numpy_load_npz(models: Path) -> Loaded:
    import numpy

    with numpy.load(models / "numpy" / "arrays.npz") as arrays:
        return dict(arrays)


# -- gguf and ONNX -------------------------------------------------------------------------------------


def gguf_reader(models: Path) -> Loaded:
    from gguf import GGUFReader

    reader = GGUFReader(models / "gguf" / "model.gguf")
    return sorted(reader.fields), {tensor.name: tensor.data for tensor in reader.tensors}


def gguf_mapped_and_populated(models: Path) -> Loaded:
    """Map as llama.cpp does: shared, every page at once."""
    with (models / "gguf" / "model.gguf").open("rb") as file:
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        with mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ) as mapped:
            mapped.madvise(mmap.MADV_WILLNEED)
            return bytes(mapped)


def onnx_runtime(models: Path) -> Loaded:
    return _infer(models / "onnx" / "model.onnx")


def onnx_runtime_with_external_data(models: Path) -> Loaded:
    return _infer(models / "onnx" / "external" / "model.onnx")


def _infer(file: Path) -> Loaded:
    import numpy
    from onnxruntime import InferenceSession

    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    features = numpy.random.default_rng(7).normal(size=(4, 512)).astype("float32")
    return session.run(None, {"input": features})


LOADERS: list[Callable[[Path], Loaded]] = [
    auto_model,
    auto_model_in_half_precision,
    auto_tokenizer,
    classifier,
    classifier_in_shards,
    classifier_from_pytorch_bin,
    classifier_from_legacy_pytorch_bin,
    pipeline,
    model_with_code_of_its_own,
    sentence_transformer,
    torch_load,
    torch_load_mapped,
    torch_load_legacy,
    safetensors_load_file,
    safetensors_safe_open,
    fastsafetensors,
    unbuffered_reads_in_threads,
    sklearn_pickle,
    joblib_load,
    joblib_load_mapped,
    joblib_load_compressed,
    numpy_load,
    numpy_load_mapped,
    numpy_load_npz,
    gguf_reader,
    gguf_mapped_and_populated,
    onnx_runtime,
    onnx_runtime_with_external_data,
]


def fingerprint(loaded: Loaded) -> str:
    """Return the SHA-256 of everything in `loaded`: names, types, shapes and each bit of the content."""
    hasher = hashlib.sha256()
    _feed(hasher, loaded)
    return hasher.hexdigest()


def _feed(hasher: Any, value: Loaded) -> None:
    if hasattr(value, "detach"):  # a tensor
        value = value.detach().numpy()
    if hasattr(value, "tobytes") and hasattr(value, "shape"):  # an array, or one number of one
        hasher.update(f"{value.dtype}{value.shape}".encode())
        hasher.update(value.tobytes())
    elif isinstance(value, Mapping):
        _feed(hasher, sorted(value.items()))
    elif isinstance(value, (list, tuple)):
        hasher.update(f"{len(value)}:".encode())
        for item in value:
            _feed(hasher, item)
    elif isinstance(value, (bytes, str, int, float)):
        hasher.update(value if isinstance(value, bytes) else repr(value).encode())
    else:
        raise TypeError(f"nothing a loader should return: {type(value)}")


def main(directory: str) -> None:
    """Run every loader on `directory`."""
    for load in LOADERS:
        line = {"loader": load.__name__}
        try:
            line["loaded"] = fingerprint(load(Path(directory)))
        except Exception:  # one that fails must not hide the others
            line["failed"] = traceback.format_exc()
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
