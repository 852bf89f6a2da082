"""Sentence embeddings by sentence-transformers."""

from typing import Any

from sentence_transformers import SentenceTransformer

ONE, OTHER = "The bank raised its interest rates.", "Borrowing money became more expensive."


def load(directory: str) -> Any:
    return SentenceTransformer(directory, device="cpu")


def use(model: Any) -> str:
    similarity = model.similarity(*model.encode([ONE, OTHER])).item()
    return f"“{ONE}” and “{OTHER}” are {similarity:.2f} alike"
