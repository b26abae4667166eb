import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kanllama_lightning.data.packing import Rows, join, pack

BOS, EOS = 1, 2
SPECIAL = [0, BOS, EOS]

documents = st.lists(st.lists(st.integers(3, 9), max_size=20), min_size=1, max_size=12)


def test_rows_by_hand():
    rows = pack([[3, 4, 5], [6, 7]], [10, 11], 4, BOS, EOS, SPECIAL)
    # stream: 1 3 4 5 2 | 1 6 7 2; the second row starts at EOS, inside document 10
    assert rows.ids.tolist() == [[1, 3, 4, 5], [1, 2, 1, 6]]
    assert rows.doc.tolist() == [[10, 10, 10, 10], [10, 10, 11, 11]]
    assert rows.keep.tolist() == [[False, True, True, True], [False, False, False, True]]


def test_a_row_that_starts_with_a_document_has_one_bos():
    rows = pack([[3, 4], [5, 6]], [0, 1], 4, BOS, EOS, SPECIAL)
    assert rows.ids.tolist() == [[1, 3, 4, 2], [1, 5, 6, 2]]
    assert rows.doc.tolist() == [[0] * 4, [1] * 4]


def test_without_eos():
    rows = pack([[3, 4], [5, 6, 7]], [0, 1], 3, BOS, None, SPECIAL)
    assert rows.ids.tolist() == [[1, 3, 4], [1, 5, 6]]


def test_too_little_for_a_row_is_padded():
    rows = pack([[3, 4]], [7], 6, BOS, EOS, SPECIAL)
    assert rows.ids[0, :4].tolist() == [1, 3, 4, 2]
    assert rows.keep.tolist() == [[False, True, True, False, False, False]]
    assert rows.doc.tolist() == [[7, 7, 7, 7, -1, -1]]


def test_no_documents_no_rows():
    rows = pack([], [], 5, BOS, EOS, SPECIAL)
    assert rows.ids.shape == rows.keep.shape == rows.doc.shape == (0, 5)
    assert (rows.ids.dtype, rows.keep.dtype) == (torch.int64, torch.bool)


def test_arrays_and_lists_pack_alike():
    lists = [[3, 4, 5], [], [6]]
    a = pack(lists, [0, 1, 2], 3, BOS, EOS, SPECIAL)
    b = pack([np.asarray(d, dtype=np.int32) for d in lists], [0, 1, 2], 3, BOS, EOS, SPECIAL)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_join_and_pick():
    rows = pack([[3, 4, 5, 6, 7, 8]], [0], 3, BOS, EOS, SPECIAL)
    again = join([rows.pick(slice(0, 1)), rows.pick(torch.arange(1, len(rows.ids)))])
    assert isinstance(again, Rows)
    assert torch.equal(again.ids, rows.ids)


@settings(max_examples=150, deadline=None)
@given(documents, st.integers(2, 9), st.booleans())
def test_nothing_is_lost_but_the_tail(docs, ctx_len, append_eos):
    eos = EOS if append_eos else None
    rows = pack(docs, range(len(docs)), ctx_len, BOS, eos, SPECIAL)
    end = [EOS] if append_eos else []
    stream = [(i, t) for i, doc in enumerate(docs) for t in [BOS, *doc, *end]]

    assert (rows.ids[:, 0] == BOS).all()
    at = 0
    for ids, keep, doc in zip(*(t.tolist() for t in rows), strict=True):
        inserted = at > 0 and stream[at][1] != BOS
        assert keep == [t not in SPECIAL and d >= 0 for t, d in zip(ids, doc, strict=True)]
        own = [(d, t) for d, t in zip(doc, ids, strict=True) if d >= 0][inserted:]
        assert own == stream[at : at + len(own)]
        if inserted:
            assert doc[0] == stream[at][0]
        at += len(own)
    padded = (rows.doc < 0).any()
    assert len(stream) - at < ctx_len
    assert not padded or (len(rows.ids) == 1 and at == len(stream))


@pytest.mark.parametrize("ctx_len", [2, 5, 64])
def test_shapes(ctx_len):
    rows = pack([list(range(3, 80))], [0], ctx_len, BOS, EOS, SPECIAL)
    assert rows.ids.shape == rows.keep.shape == rows.doc.shape
    assert rows.ids.shape[1] == ctx_len
