"""The demo's reading matter: chapters of Python's own manual, which every installation carries, or the user's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .demo_model import DemoError

__all__ = ["Document", "check_folder", "documents", "prompt"]

#: Topics of ``pydoc_data`` and three questions about each; the first ones that are long enough are read.
_TOPICS = {
    "typesmapping": (
        "What may not be used as a key?",
        "What does setdefault do?",
        "In which order does popitem return pairs?",
    ),
    "customization": (
        "What does __new__ return?",
        "What is __repr__ for?",
        "When is __del__ called?",
    ),
    "attribute-access": (
        "When is __getattr__ called?",
        "What is a descriptor?",
        "What must __dir__ return?",
    ),
    "assignment": (
        "What is an assignment statement used for?",
        "What is an augmented assignment?",
        "What happens if the target is an identifier?",
    ),
    "comparisons": (
        "How are sequences compared?",
        "When do two mappings compare equal?",
        "What do the operators is and is not test?",
    ),
    "strings": (
        "What does a raw string do with backslashes?",
        "What is a bytes literal?",
        "What ends a triple-quoted string?",
    ),
    "execmodel": (
        "What is a code block?",
        "What is a free variable?",
        "When is UnboundLocalError raised?",
    ),
    "import": (
        "What are the two steps of an import statement?",
        "What are the public names of a module?",
        "What is a future statement?",
    ),
}
#: How many of them are read, and how much of each, where nothing is said: so much that two cores are done in a minute or so.
_COUNT, _LENGTH = 2, 1200
#: Chapters of fewer tokens are passed over, since others are longer.
_SHORTEST = 1500
_QUESTIONS = ("What is this text about?", "What is its most important point?", "Which example does it give?")


@dataclass(frozen=True)
class Document:
    """A text and one question about it for each round."""

    name: str
    text: str
    questions: tuple[str, ...]


def documents(
    folder: str | None, tokenizer: Any, limit: int, count: int | None = None, length: int | None = None
) -> list[Document]:
    """What the demo reads: the files of a folder in the order of their names, or chapters of Python's manual.

    Args:
        folder: a directory with ``.txt``, ``.md`` or ``.rst`` files; ``None`` for the manual.
        tokenizer: the model's; measures length.
        limit: tokens that the model can read at most; longer texts are cut before.
        count: how many are read at most; ``None`` for two chapters, or for all files.
        length: tokens of each that are read at most; ``None`` for 1200 of a chapter, or for what the model can read of a file.

    Raises:
        DemoError: the folder is missing or holds no such file.
    """
    if folder is None:
        return _manual(tokenizer, min(limit, length or _LENGTH), count or _COUNT)
    limit = min(limit, length or limit)
    texts = list(_texts(folder).items())[:count]
    return [Document(name, _cut(text, tokenizer, limit), _QUESTIONS) for name, text in texts]


def check_folder(folder: str | None) -> None:
    """Find out before a model is loaded that :func:`documents` would find nothing to read.

    Raises:
        DemoError: as there.
    """
    if folder is not None:
        _texts(folder)


def _texts(folder: str) -> dict[str, str]:
    """File name -> text, in the order of the names."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise DemoError(f"--docs {folder}: expected a directory with .txt, .md or .rst files; there is no such directory")
    files = sorted(file for file in path.iterdir() if file.suffix in (".txt", ".md", ".rst") and file.is_file())
    texts = {file.name: file.read_text(encoding="utf-8", errors="replace").strip() for file in files}
    texts = {name: text for name, text in texts.items() if text}
    if not texts:
        raise DemoError(
            f"--docs {folder}: expected .txt, .md or .rst files with text in it; found none: name another directory"
        )
    return texts


def _manual(tokenizer: Any, limit: int, count: int) -> list[Document]:
    from pydoc_data.topics import topics

    found: list[Document] = []
    for name, questions in _TOPICS.items():  # chapters differ in length between Python versions
        text = topics.get(name, "").strip()
        if len(found) < count and len(tokenizer(text).input_ids) >= _SHORTEST:
            found.append(Document(name, _cut(text, tokenizer, limit), questions))
    return found


def _cut(text: str, tokenizer: Any, tokens: int) -> str:
    """``text`` up to the last paragraph that ends within ``tokens`` tokens."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if len(encoded.input_ids) <= tokens:
        return text
    head = text[: encoded.offset_mapping[tokens][0]]
    paragraphs = head.rpartition("\n\n")[0]
    return paragraphs or head


def prompt(document: Document, question: str, tokenizer: Any) -> Any:
    """Token ids [1, tokens] of a chat that holds the document first and the question last."""
    chat = [{"role": "user", "content": f"{document.text}\n\n{question}"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
