"""Small token folders that the tests of data and training share."""

import json

from klflow_ext.train import prepare_tokens

TEXTS = [f"the cat {i} sat on mat {i * i} and ran " * (1 + i % 9) for i in range(400)]


def whole_documents(parts):
    """The texts of documents that come in parts (text, whether it is the last of its document)."""
    found, begun = [], ""
    for text, last in parts:
        begun += text
        if last:
            found.append(begun)
            begun = ""
    assert not begun
    return found


def token_folder(folder, texts=TEXTS, **options):
    """A token folder of these documents, with V = 300 and small shards."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = folder.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepare_tokens([source], folder, **{"vocab_size": 300, "shard_tokens": 2000, "heldout": 0.1, **options})
