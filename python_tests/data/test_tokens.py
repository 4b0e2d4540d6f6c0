"""Token folders: what is in them is what was written, or an error names the file; mixtures and names of them."""

import json
import shutil

import numpy as np
import pytest
from texts import TEXTS, token_folder

from klflow_ext import data
from klflow_ext.data import Mixture, TokenFolder
from klflow_ext.data.tokens import fingerprint_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return token_folder(tmp_path_factory.mktemp("tokens") / "tokens")


@pytest.fixture
def folder(whole, tmp_path):
    return TokenFolder(shutil.copytree(whole.folder, tmp_path / "tokens"))


def test_the_texts_come_back(whole):
    tokenizer = whole.tokenizer()
    found = []
    for split in (whole.train, whole.heldout):
        texts = [tokenizer.decode(split.document(i).tolist()) for i in range(split.documents)]
        assert texts == sorted(texts, key=TEXTS.index)  # as they stood
        assert split.counts.tolist() == np.bincount(split[:], minlength=300).tolist()
        found += texts
        for a, b in ((0, 1), (1990, 2010), (0, len(split)), (5, 5), (len(split) - 1, len(split) + 9)):
            assert split[a:b].tolist() == split[:][a:b].tolist()
    assert sorted(found) == sorted(TEXTS) and 10 < whole.heldout.documents < 80
    whole.verify()


def edit(folder, **values):
    """The index with other values, with its fingerprint or without."""
    path = folder.folder / "index.json"
    index = json.loads(path.read_text()) | values
    path.write_text(json.dumps(index))
    return index


@pytest.mark.parametrize("name", ["train-00001.tokens", "heldout-00000.ends", "train.counts", "tokenizer.json"])
def test_files_that_are_not_those_that_were_written(folder, name):
    path = folder.folder / name
    raw = path.read_bytes()
    path.write_bytes(raw[:-2])
    with pytest.raises(ValueError, match=f"{name} has {len(raw) - 2} bytes, index.json says {len(raw)} bytes"):
        TokenFolder(folder.folder)
    path.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    with pytest.raises(ValueError, match=f"{name} was changed: it does not fit its fingerprint"):
        TokenFolder(folder.folder).verify()
    if name in ("tokenizer.json", "train.counts"):
        with pytest.raises(ValueError, match=f"{name} was changed"):
            TokenFolder(folder.folder)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing, index.json says"):
        TokenFolder(folder.folder)


def test_an_id_beyond_the_vocabulary(folder):
    path = folder.folder / "train-00001.tokens"
    tokens = np.fromfile(path, "<u2")
    tokens[7] = 300
    tokens.tofile(path)
    with pytest.raises(ValueError, match="train-00001.tokens holds the id 300, allowed are those below 300"):
        TokenFolder(folder.folder).train[:]


@pytest.mark.parametrize("value", [0, -5, 10**9, 1])
def test_a_document_end_that_is_none(folder, value):
    path = folder.folder / "train-00001.ends"
    ends = np.fromfile(path, "<i8")
    ends[2] = value
    ends.tofile(path)
    with pytest.raises(ValueError, match="train-00001.ends was changed: it holds a document's end that is none"):
        tokens = TokenFolder(folder.folder).train
        tokens.places(np.arange(tokens.documents))


def test_a_bad_index(folder, tmp_path):
    with pytest.raises(ValueError, match="is no folder of tokens: it has no index.json"):
        TokenFolder(tmp_path)
    index = edit(folder, vocab_size=200)
    with pytest.raises(ValueError, match="index.json was changed"):
        TokenFolder(folder.folder)
    edit(folder, fingerprint=fingerprint_of(index))
    with pytest.raises(ValueError, match="has a tokenizer of 300 ids, index.json says 200"):
        TokenFolder(folder.folder).tokenizer()
    edit(folder, format=2)
    with pytest.raises(ValueError, match="has format 2, allowed is 1: prepare it again with this version"):
        TokenFolder(folder.folder)
    for text in ("{", "[]", "", "[" * 100_000):
        (folder.folder / "index.json").write_text(text)
        with pytest.raises(ValueError, match="index.json cannot be read|has format None"):
            TokenFolder(folder.folder)


def test_large_vocabularies_have_wider_ids():
    from klflow_ext.data.tokens import DTYPES, dtype_name

    assert (dtype_name(1 << 16), dtype_name((1 << 16) + 1)) == ("uint16", "uint32")
    assert np.array((1 << 16) - 1).astype(DTYPES["uint16"]) == (1 << 16) - 1


def test_mixtures(whole, tmp_path):
    other = token_folder(tmp_path / "other", TEXTS[:100], tokenizer=whole.folder / "tokenizer.json")
    mixture = Mixture([whole.train, other.train], [3, 1])
    assert mixture.weights == [0.75, 0.25] and len(mixture) == len(whole.train) + len(other.train)
    counts = data.token_counts(mixture, 300)
    assert counts.sum() == pytest.approx(len(mixture))
    want = 0.75 * whole.train.counts / len(whole.train) + 0.25 * other.train.counts / len(other.train)
    assert np.allclose(counts / counts.sum(), want)
    assert Mixture([whole.train, other.train]).weights[0] == len(whole.train) / len(mixture)
    assert Mixture([whole.train, other.train], [0, 2]).streams == [other.train]
    for weights in ([1, -1], [0, 0], [1], [1, float("nan")], [1, float("inf")]):
        with pytest.raises(ValueError, match="weights: got"):
            Mixture([whole.train, other.train], weights)
    foreign = token_folder(tmp_path / "foreign", TEXTS[:100])
    with pytest.raises(ValueError, match="foreign beside .*tokens, which has another tokenizer; allowed are folders"):
        Mixture([whole.train, foreign.train])
    with pytest.raises(ValueError, match="streams: got ndarray, allowed are splits of token folders"):
        Mixture([np.arange(100)])
    with pytest.raises(
        ValueError, match=rf"stream: got {len(other.train)} tokens in .*other \(train\), allowed are more"
    ):
        data.order_of(mixture, len(other.train), 0)
    with pytest.raises(ValueError, match="stream: got 9 tokens, allowed are more than length = 9"):
        data.order_of(np.arange(9), 9, 0)
    with pytest.raises(ValueError, match="shuffle: got 'documents', allowed with ndarray is 'windows'"):
        data.order_of(np.arange(99), 9, 0, "documents")
    with pytest.raises(ValueError, match="shuffle: got 'tokens'"):
        data.order_of(np.arange(99), 9, 0, "tokens")


def test_names_of_sources(tmp_path):
    (tmp_path / "a=b").mkdir()
    names = [tmp_path / "x", f"{tmp_path / 'a=b'}"]
    assert data.parse_sources(names) == (names[:1] + [tmp_path / "a=b"], None)
    assert data.parse_sources(["x=2", f"{tmp_path / 'a=b'}=.5"])[1] == [2.0, 0.5]
    assert data.parse_sources("x=2") == ([data.text.Path("x")], [2.0])
    with pytest.raises(ValueError, match="data: got 'x=y', allowed is PATH or PATH=WEIGHT"):
        data.parse_sources(["x=y"])
    with pytest.raises(ValueError, match="allowed is a weight for each source or for none"):
        data.parse_sources(["x=1", "y"])


def test_a_reference_finds_what_it_was_made_of(whole, tmp_path):
    sources = data.reference(whole.train)
    stream, heldout = data.from_reference(sources)
    assert stream[:].tolist() == whole.train[:].tolist() and heldout[:].tolist() == whole.heldout[:].tolist()
    assert data.reference(np.arange(5)) is None
    moved = shutil.copytree(whole.folder, tmp_path / "moved")
    assert data.from_reference(sources, [moved])[0].source.folder == moved
    gone = [sources[0] | {"folder": str(tmp_path / "gone")}]
    with pytest.raises(ValueError, match="the run was trained on .*gone, where no token folder is; --data says where"):
        data.from_reference(gone)
    other = token_folder(tmp_path / "other", TEXTS[:100])
    with pytest.raises(ValueError, match=f"other has fingerprint {other.fingerprint}, allowed is {whole.fingerprint}"):
        data.from_reference(sources, [other.folder])
    with pytest.raises(ValueError, match="got 2 folders, allowed are the 1 of the run"):
        data.from_reference(sources, [moved, moved])
    for bad in ({}, [3], [sources[0] | {"split": "test"}], [sources[0] | {"weight": "1"}]):
        with pytest.raises(ValueError, match="data: the run says"):
            data.from_reference(bad)
