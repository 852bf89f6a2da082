"""Filters: globs as huggingface_hub has them, and one format of weights that are there in several."""

from __future__ import annotations

from collections.abc import Iterable
from string import ascii_lowercase

import pytest
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st

from modelfs.types import Entry, Snapshot
from modelfs.views import Face
from modelfs.views.filters import duplicates, filtered

PRODUCTION = Face(formats="production")


def snapshot(*paths: str) -> Snapshot:
    return Snapshot.of("s3://bucket/model/", "", [Entry(path, 10, "v") for path in paths])


def left(face: Face, paths: Iterable[str]) -> set[str]:
    return set(filtered(face, snapshot(*paths)).entries)


PATHS = st.lists(st.text("ab./-", min_size=1, max_size=8), max_size=8, unique=True)
GLOBS = st.lists(st.text("ab./*?[]!", min_size=1, max_size=5), max_size=3)


@given(PATHS, GLOBS, GLOBS)
def test_globs_mean_what_they_mean_to_the_hub(
    paths: list[str], include: list[str], exclude: list[str]
) -> None:
    listed = snapshot(*paths)
    wanted = filter_repo_objects(
        list(listed.entries), allow_patterns=include or None, ignore_patterns=exclude or None
    )
    shown = filtered(Face(tuple(include), tuple(exclude)), listed)
    assert list(shown.entries) == sorted(wanted)
    assert shown.hidden == len(listed.entries) - len(shown.entries)


def test_a_model_without_filters_is_shown_as_it_is() -> None:
    listed = snapshot("a", "b/c")
    assert filtered(Face(), listed) is listed


def test_directories_of_which_nothing_is_shown_are_gone() -> None:
    shown = filtered(Face(exclude=("onnx/",)), snapshot("config.json", "onnx/model.onnx", "onnx/a/b"))
    assert [line.path for line, _ in shown.listing.children("")] == ["config.json"]
    assert shown.hidden == 2


def test_only_files_count_as_hidden() -> None:
    entries = [
        Entry("empty", kind="directory"),
        Entry("a.bin", 3),
        Entry("link.bin", kind="symlink", target="a.bin"),
    ]
    listed = Snapshot.of("s3://b/", "", entries)
    shown = filtered(Face(include=("*.json",)), listed)
    assert (len(shown.entries), shown.hidden) == (0, 1)


def test_filters_of_a_lock_or_a_listing_leave_the_rest_of_a_snapshot_alone() -> None:
    listed = snapshot("a.json", "b.bin")
    shown = filtered(Face(exclude=("*.bin",)), listed)
    assert (shown.url, shown.revision, shown.rejected) == (listed.url, listed.revision, listed.rejected)
    assert filtered(Face(exclude=("*.bin",)), shown).hidden == 1


SDXL = {
    "model_index.json": True,
    "sd_xl_base_1.0.safetensors": True,
    "sd_xl_base_1.0.ckpt": False,
    "text_encoder/config.json": True,
    "text_encoder/model.safetensors": True,
    "text_encoder/model.fp16.safetensors": True,
    "text_encoder/pytorch_model.bin": False,
    "text_encoder/flax_model.msgpack": False,
    "text_encoder/tf_model.h5": False,
    "unet/diffusion_pytorch_model.fp16.safetensors": True,
    "unet/diffusion_pytorch_model.bin": False,
    "unet/diffusion_flax_model.msgpack": False,
    "unet/model.onnx": True,
    "vae/diffusion_pytorch_model.bin": True,
    "vae/diffusion_pytorch_model.non_ema.bin": True,
    "vae_1_0/diffusion_pytorch_model.bin": False,
    "vae_1_0/diffusion_pytorch_model.fp16.bin": True,
}
BERT = {
    "config.json": True,
    "model.safetensors": True,
    "pytorch_model.bin": False,
    "pytorch_model.bin.index.json": False,
    "pytorch_model-00001-of-00002.bin": False,
    "pytorch_model-00002-of-00002.bin": False,
    "training_args.bin": True,
    "optimizer.bin": True,
    "openvino/openvino_model.bin": True,
    "onnx/model.onnx": True,
    "rust_model.ot": True,
}
IN_SHARDS = {
    "model-00001-of-00002.safetensors": True,
    "model-00002-of-00002.safetensors": True,
    "model.safetensors.index.json": True,
    "pytorch_model-00001-of-00003.bin": False,
    "pytorch_model.bin.index.json": False,
    "model.fp16-00001-of-00002.safetensors": True,
    "model.safetensors.index.fp16.json": True,
}
HALF_AN_UPLOAD = {
    "model-00001-of-00002.safetensors": True,
    "model.safetensors.index.json": True,
    "pytorch_model-00001-of-00002.bin": True,
    "pytorch_model-00002-of-00002.bin": True,
}
NO_SAFETENSORS = {"pytorch_model.bin": True, "tf_model.h5": True, "a.ckpt": True, "index.html": True}


@pytest.mark.parametrize(
    "files",
    [SDXL, BERT, IN_SHARDS, HALF_AN_UPLOAD, NO_SAFETENSORS],
    ids=["sdxl", "bert", "in shards", "half an upload", "no safetensors"],
)
def test_formats_for_production(files: dict[str, bool]) -> None:
    assert left(PRODUCTION, files) == {path for path, is_shown in files.items() if is_shown}


def test_what_is_excluded_hides_nothing_else() -> None:
    paths = "model.safetensors", "pytorch_model.bin"
    assert left(Face(exclude=("*.safetensors",), formats="production"), paths) == {"pytorch_model.bin"}


WEIGHTS = st.builds(
    "{}{}{}.{}".format,
    st.sampled_from(["", "a/"]),
    st.sampled_from(["model", "pytorch_model", "tf_model", "other"]),
    st.sampled_from(["", ".fp16", "-00001-of-00002", "-00002-of-00002"]),
    st.sampled_from(["safetensors", "bin", "h5", "ckpt", "msgpack", "json", "onnx"]),
)


@given(st.sets(WEIGHTS, max_size=12))
def test_no_weights_are_lost(paths: set[str]) -> None:
    hidden = duplicates(paths)
    assert hidden < paths or not hidden
    assert not any(path.endswith((".safetensors", ".json", ".onnx")) for path in hidden)
    for path in hidden:  # something is left in that directory
        folder = path.rpartition("/")[0]
        assert any(other.rpartition("/")[0] == folder for other in paths - hidden)
    assert not duplicates(paths - hidden)


@given(st.text(ascii_lowercase + "./-0123456789", max_size=40))
def test_any_name_is_taken(path: str) -> None:
    assert not duplicates([path])
