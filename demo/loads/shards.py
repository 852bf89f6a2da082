"""A BERT in four safetensors shards, by transformers."""

from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, BertModel, PreTrainedTokenizerBase


def load(directory: str) -> Any:
    return AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory)


def use(model: tuple[PreTrainedTokenizerBase, BertModel]) -> str:
    tokenizer, bert = model
    with torch.inference_mode():
        hidden = bert(**tokenizer("profit and growth rise", return_tensors="pt")).last_hidden_state
    return f"{type(bert).__name__}, {bert.num_parameters():,} weights; hidden states {tuple(hidden.shape)}"
