"""The shuffle buffer: no row lost, none twice."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kanllama_lightning.data.buffer import ShuffleBuffer, dealt
from kanllama_lightning.types import InputError

D = 3


def allocated(capacity, queue, dtype="float32", seed=0):
    buffer = ShuffleBuffer(capacity, dtype)
    buffer.allocate_(D, queue, torch.device("cpu"), seed)
    return buffer


def numbered(start, n):
    """Rows that can be told apart, to the last coordinate."""
    return torch.arange(start * D, (start + n) * D).float().view(n, D)


def multiset(*parts):
    return Counter(tuple(row) for part in parts for row in part.tolist())


def contents(buffer):
    return buffer.held[: buffer.filled], buffer.queue[: buffer.queued]


class Source:
    """Rows in odd numbers, as an LM pass gives them."""

    def __init__(self, sizes, start=0):
        self.sizes, self.i, self.n = sizes, 0, start

    def rows(self):
        n = self.sizes[self.i % len(self.sizes)]
        self.i += 1
        self.n += n
        return numbered(self.n - n, n)


@settings(max_examples=60)
@given(
    capacity=st.integers(1, 30),
    share=st.floats(0, 1),
    sizes=st.lists(st.integers(0, 11), min_size=1, max_size=6).filter(any),
    swaps=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_every_row_leaves_once(capacity, share, sizes, swaps, seed):
    batch = max(1, round(share * capacity))
    buffer = allocated(capacity, batch + max(sizes), seed=seed)
    memory = buffer.held.data_ptr(), buffer.queue.data_ptr()
    shapes = buffer.held.shape, buffer.queue.shape
    source, out = Source(sizes), []
    for _ in range(swaps):
        while buffer.wants(batch):
            buffer.push_(source.rows())
        out.append(buffer.swap_(batch))
        assert out[-1].shape == (batch, D)
        assert out[-1].dtype == torch.float32
        assert multiset(*out, *contents(buffer)) == multiset(numbered(0, source.n))
    assert (buffer.held.data_ptr(), buffer.queue.data_ptr()) == memory
    assert (buffer.held.shape, buffer.queue.shape) == shapes


def test_what_comes_out_is_shuffled():
    buffer = allocated(1000, 1100)
    buffer.push_(numbered(0, 1100))
    first = buffer.swap_(100)[:, 0] / D
    assert (first < 1000).all()
    assert (first.diff() < 0).float().mean() > 0.3  # in no order
    assert first.max() - first.min() > 900  # from all over
    assert (buffer.held[:, 0] / D >= 1000).sum() == 100


def test_fills_before_it_queues():
    buffer = allocated(4, 5)
    buffer.push_(numbered(0, 3))
    assert (buffer.filled, buffer.queued) == (3, 0)
    buffer.push_(numbered(3, 3))
    assert (buffer.filled, buffer.queued) == (4, 2)
    assert torch.equal(buffer.queue[:2], numbered(4, 2))


def test_wants():
    buffer = allocated(4, 5)
    wanted = []
    for i in range(7):
        wanted.append((buffer.wants(2), buffer.wants(3)))
        buffer.push_(numbered(i, 1))
    assert wanted == [(True, True)] * 6 + [(False, True)]
    assert not buffer.wants(3)


def test_the_queue_leaves_in_order():
    buffer = allocated(1, 4)
    buffer.push_(numbered(0, 5))
    assert [int(buffer.swap_(1)[0, 0]) // D for _ in range(4)] == [0, 1, 2, 3]


def test_sample_leaves_the_rows_there():
    buffer = allocated(6, 2, dtype="bfloat16")
    buffer.push_(numbered(0, 4))
    sample = buffer.sample(3)
    assert sample.dtype == torch.float32
    assert torch.equal(sample, numbered(0, 3))
    assert buffer.sample(100).shape == (4, D)
    assert buffer.filled == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_holds_rows_in_its_number_format(dtype):
    buffer = allocated(2, 2, dtype)
    rows = torch.tensor([[0.1, 100.3, -7.7]] * 4)
    buffer.push_(rows)
    assert buffer.held.dtype == buffer.queue.dtype == getattr(torch, dtype)
    assert torch.equal(buffer.swap_(2), rows[:2].to(getattr(torch, dtype)).float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pushed", [3, 8, 23])
def test_goes_on_from_its_state_as_if_never_stopped(dtype, pushed, tmp_path):
    """While filling, when just full, and after swaps."""
    sizes = [5, 1, 4]
    buffer, source = allocated(8, 8, dtype, seed=1), Source(sizes)
    while source.n < pushed:
        buffer.push_(numbered(source.n, 1))
        source.n += 1
        if not buffer.wants(3):
            buffer.swap_(3)
    torch.save(buffer.state(), tmp_path / "state.pt")
    resumed = allocated(8, 8, dtype, seed=77)
    resumed.push_(numbered(500, 9))  # what a new run may have put there
    resumed.load_(torch.load(tmp_path / "state.pt", weights_only=True))
    source_too = copy.deepcopy(source)
    for _ in range(6):
        for one, rows_from in ((buffer, source), (resumed, source_too)):
            while one.wants(3):
                one.push_(rows_from.rows())
        assert torch.equal(buffer.swap_(3), resumed.swap_(3))
    assert all(map(torch.equal, contents(buffer), contents(resumed)))


def test_draws_of_another_kind_of_device_begin_anew(caplog):
    """A CUDA generator's state has 16 bytes, a CPU's 5056."""
    full = allocated(8, 8, seed=3)
    full.push_(numbered(0, 11))
    full.swap_(3)
    state = {name: value.clone() for name, value in full.state().items()}
    resumed, fresh = allocated(8, 8, seed=5), allocated(8, 8, seed=5)
    resumed.load_(state | {"generator": torch.zeros(16, dtype=torch.uint8)})
    assert "another kind of device than cpu" in caplog.text
    assert torch.equal(resumed.held, full.held)
    fresh.load_({name: state[name] for name in ("held", "queue")})
    for buffer in (resumed, fresh, full):
        buffer.push_(numbered(50, 3))
    drawn = resumed.swap_(3)
    assert torch.equal(drawn, fresh.swap_(3))
    assert not torch.equal(drawn, full.swap_(3))
    caplog.clear()
    allocated(8, 8).load_(state)
    assert not caplog.text


def test_seeds_draw_differently():
    outs = []
    for seed in (0, 0, 1):
        buffer = allocated(50, 50, seed=seed)
        buffer.push_(numbered(0, 100))
        outs.append(buffer.swap_(50))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_draws_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    buffer = allocated(50, 50)
    buffer.push_(numbered(0, 100))
    buffer.swap_(50)
    assert torch.equal(torch.get_rng_state(), state)


def test_refuses_less_than_nothing():
    with pytest.raises(InputError, match=r"buffer\.capacity_tokens=-1"):
        ShuffleBuffer(-1)


def test_refuses_a_swap_that_it_wants_rows_for_and_a_queue_overrun():
    buffer = allocated(4, 2)
    with pytest.raises(AssertionError, match="push more rows"):
        buffer.swap_(1)
    with pytest.raises(AssertionError, match="queue overrun"):
        buffer.push_(numbered(0, 7))


def test_refuses_the_state_of_another_number_format():
    full = allocated(8, 8, "float16")
    full.push_(numbered(0, 16))
    with pytest.raises(InputError, match="the run's own configuration"):
        allocated(8, 8).load_(full.state())


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2), (2, 4)])
def test_other_processes_share_what_was_held_and_lose_no_row(before, after):
    """What does not fit among the held rows waits, and leaves later."""
    states, rows = [], []
    for rank in range(before):
        buffer = ShuffleBuffer(24)
        buffer.allocate_(D, 10, torch.device("cpu"), rank, before)
        buffer.push_(numbered(100 * rank, 24 // before + 5 + rank))
        states.append(buffer.state())
        rows += (buffer.held[: buffer.filled, 0].tolist()) + buffer.queue[
            : buffer.queued, 0
        ].tolist()
    got = []
    for rank in range(after):
        buffer = ShuffleBuffer(24)
        buffer.allocate_(D, 10, torch.device("cpu"), rank, after)
        buffer.load_(dealt(states, rank, after))
        assert buffer.filled <= buffer.capacity == 24 // after
        got += (buffer.held[: buffer.filled, 0].tolist()) + buffer.queue[
            : buffer.queued, 0
        ].tolist()
    assert sorted(got) == sorted(rows)


def test_without_capacity_rows_leave_in_the_order_of_the_text():
    buffer = allocated(0, 8)
    buffer.push_(numbered(0, 5))
    assert buffer.wants(6)
    assert not buffer.wants(3)
    assert torch.equal(buffer.swap_(3), numbered(0, 3))
    buffer.push_(numbered(5, 3))
    assert torch.equal(buffer.swap_(4), numbered(3, 4))
    assert len(buffer.sample(10)) == 0


def test_refuses_the_state_of_another_width():
    full = allocated(8, 8)
    full.push_(numbered(0, 8))
    wide = ShuffleBuffer(8)
    wide.allocate_(D + 1, 8, torch.device("cpu"), 0)
    with pytest.raises(InputError, match="the run's own configuration"):
        wide.load_(full.state())
