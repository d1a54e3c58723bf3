"""What only a device has: streams, graphs, its memory and its errors. Each test runs on the cuda and on the triton
backend; what is not of a device alone runs on the cpu backend too, small, so that the tests themselves are tested.
"""

from __future__ import annotations

import ctypes
import math
import threading

import pytest
import torch

from hvprune import _native
from hvprune._registry import OPS
from hvprune.testing import (
    CASES,
    Backend,
    assert_no_worse_than_torch,
    assert_same_bits,
    by_torch,
    flatten,
    map_tensors,
    numeric_oracle,
)

from test_errors import REJECTED  # isort: skip

CPU = Backend("cpu", "cpu")
DEVICES = [Backend("cuda", "cuda"), Backend("triton", "cuda")]
OP_AND_DEVICE = [pytest.param(op, backend, id=f"{op}-{backend}") for op in sorted(OPS) for backend in DEVICES]
OP_AND_BACKEND = [*OP_AND_DEVICE, *(pytest.param(op, CPU, id=f"{op}-{CPU}") for op in sorted(OPS))]
REPEATS = 100
VARIANTS = 5


def tensors_of(value) -> list[torch.Tensor]:
    found = []
    map_tensors(value, lambda x: found.append(x) or x)
    return found


def overwrite(target, source) -> None:
    """Copies the tensors of one call's arguments into those of another."""
    for old, new in zip(tensors_of(target), tensors_of(source), strict=True):
        old.copy_(new)


def two_cases(op: str) -> list:
    """The size of a real encoder, and a small one."""
    return [CASES[op][0], next(case for case in CASES[op][1:] if case.is_small() and "no image" not in case.name)]


def variants(case, backend: Backend) -> list:
    return [case.inputs(torch.float16, backend.device, variant) for variant in range(VARIANTS)]


# Streams and graphs


@pytest.mark.parametrize("op, backend", OP_AND_DEVICE)
def test_graph_replays_with_changed_inputs(op, backend):
    for case in two_cases(op):
        inputs = variants(case, backend)
        expected = [backend.call(op, *given) for given in inputs]
        static = map_tensors(inputs[0], torch.clone)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = backend.call(op, *static)
        for replay in range(REPEATS):
            overwrite(static, inputs[replay % VARIANTS])
            graph.replay()
            assert_same_bits(result, expected[replay % VARIANTS], f"{case}, replay {replay}")


@pytest.mark.parametrize("op, backend", OP_AND_DEVICE)
def test_same_bits_on_two_streams_at_once(op, backend):
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for case in two_cases(op):
        given = case.inputs(torch.float16, backend.device)
        expected = backend.call(op, *given)
        torch.cuda.synchronize()
        results = []
        for _ in range(REPEATS):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(backend.call(op, *given))
        torch.cuda.synchronize()
        for repeat, result in enumerate(results):
            assert_same_bits(result, expected, f"{case}, call {repeat}")


@pytest.mark.parametrize("op, backend", OP_AND_DEVICE)
def test_takes_its_turn_in_the_current_stream(op, backend):
    """Inputs that a side stream writes late are waited for, and what the stream does next sees the result."""
    stream = torch.cuda.Stream()
    for case in two_cases(op):
        given = case.inputs(torch.float16, backend.device)
        late = map_tensors(given, torch.zeros_like)
        expected = backend.call(op, *given)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # cycles, about 10 ms
            overwrite(late, given)
            result = [x.clone() for x in flatten(backend.call(op, *late))]
        stream.synchronize()
        assert_same_bits(result, expected, str(case))


@pytest.mark.parametrize("op, backend", OP_AND_DEVICE)
def test_threads_with_streams_of_their_own(op, backend):
    case = two_cases(op)[1]
    given = case.inputs(torch.float16, backend.device)
    expected, failures = backend.call(op, *given), []
    torch.cuda.synchronize()

    def work():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    assert_same_bits(backend.call(op, *given), expected)
        except BaseException as failure:
            failures.append(failure)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


@pytest.mark.parametrize("op, backend", OP_AND_DEVICE)
def test_does_not_wait_for_the_device(op, backend):
    for case in two_cases(op):
        given = case.inputs(torch.float16, backend.device)
        backend.call(op, *given)
        done = torch.cuda.Event()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")  # torch's own waits raise; those of others show in the event
        try:
            torch.cuda._sleep(400_000_000)  # cycles, about 200 ms
            backend.call(op, *given)
            done.record()
            assert not done.query(), str(case)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op, backend", OP_AND_DEVICE)
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_other_than_the_current_one(op, backend):
    case = two_cases(op)[1]
    expected = backend.call(op, *case.inputs(torch.float16, "cuda:0"))
    with torch.cuda.device(0):
        result = backend.call(op, *case.inputs(torch.float16, "cuda:1"))
        assert torch.cuda.current_device() == 0
    assert {x.device.index for x in flatten(result)} == {1}
    assert_same_bits(result, expected)


# Memory


@pytest.mark.parametrize("op, backend", OP_AND_DEVICE)
def test_thousand_calls_leave_no_memory_behind(op, backend):
    given = two_cases(op)[1].inputs(torch.float16, backend.device)
    for _ in range(10):
        backend.call(op, *given)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(1000):
        backend.call(op, *given)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@pytest.mark.parametrize("backend", DEVICES, ids=str)
@pytest.mark.parametrize("rows", ["all", "cls"])
def test_attention_importance_takes_the_memory_it_says(backend, rows):
    batch, heads, length, layers, block = 2, 16, 577, 3, 512  # block: what the allocator rounds to
    total = length - 1
    tensors = [torch.randn(batch, heads, length, 64, device="cuda", dtype=torch.float16) for _ in range(2 * layers)]
    args, kwargs = (tensors[:layers], tensors[layers:]), {"rows": rows}
    backend.call("attention_importance", args, kwargs)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = backend.call("attention_importance", args, kwargs)
    extra = torch.cuda.max_memory_allocated() - before - out.numel() * 4
    stated = (
        batch * (12 * total + 4) if backend.name == "cuda" else 4 * batch * layers * heads * total * -(-length // 32)
    )
    assert extra <= stated + 2 * block


# Batches and sizes


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
@pytest.mark.parametrize("op, backend", OP_AND_BACKEND)
def test_every_image_of_a_batch_is_as_alone(op, backend, batch):
    for case in two_cases(op):
        images = [map_tensors(given, lambda x: x[:1]) for given in variants(case, backend)]
        alone = [flatten(backend.call(op, *image)) for image in images]
        order = [i % VARIANTS for i in range(batch)]
        together = iter([torch.cat(same) for same in zip(*(tensors_of(images[i]) for i in order), strict=True)])
        result = flatten(backend.call(op, *map_tensors(images[0], lambda _, together=together: next(together))))
        for position, i in enumerate(order):
            for whole, single in zip(result, alone[i], strict=True):
                assert_same_bits(whole[position : position + 1], single, f"{case}, image {position} of {batch}")


# Images of the first case with which inputs, outputs or both exceed 2^31 elements.
LARGE_BATCH = {
    "aggregate_attention": 1_620,
    "attention_importance": 14_600,
    "cosine_similarity": 6_500,
    "diverse_select": 6_500,
    "gather_tokens": 16_400,
    "hierarchical_select": 3_800_000,
    "hivtp_select": 14_600,
    "vispruner_select": 6_500,
}


def check_large_batch(op: str, backend: Backend, batch: int) -> int:
    """Every image but the last is the same, and its result too; returns the elements of the largest tensor."""
    (image, other), copies = variants(CASES[op][0], backend)[:2], batch - 1
    image, other = map_tensors((image, other), lambda x: x[:1])
    alone, other_alone = flatten(backend.call(op, *image)), flatten(backend.call(op, *other))
    last = iter(tensors_of(other))

    def repeated(x):
        return torch.cat([x.expand(copies, *x.shape[1:]), next(last)])

    given = map_tensors(image, repeated)
    results = flatten(backend.call(op, *given))
    for result, single, single_other in zip(results, alone, other_alone, strict=True):
        assert bool((result[:copies] == single).all())
        assert_same_bits(result[copies:], single_other)
    return max(x.numel() for x in [*tensors_of(given), *results])


@pytest.mark.parametrize("op", sorted(LARGE_BATCH))
def test_large_batch_on_a_small_scale(op):
    check_large_batch(op, CPU, 5)


@pytest.mark.slow
@pytest.mark.parametrize("op, backend", OP_AND_DEVICE)
def test_more_than_2_to_the_31_elements(op, backend):
    torch.cuda.empty_cache()
    assert check_large_batch(op, backend, LARGE_BATCH[op]) > 2**31


def check_large_image(op: str, backend: Backend, elements: int) -> None:
    """One image of at least so many elements, right in its last rows."""
    device, dtype = backend.device, torch.float16
    if op == "gather_tokens":
        width = 1024
        total = elements // width + 1
        row = torch.arange(width, device=device, dtype=dtype)
        features = (torch.arange(total, device=device) % 997).to(dtype)[:, None] * 2 + row % 2
        assert features.numel() >= elements
        kept = torch.tensor([0, total // 2, total - 2, total - 1], device=device)
        assert_same_bits(backend.call(op, (features[None], kept[None]), {}), features[kept][None])
        selection = torch.arange(total - 1, -1, -1, device=device)[None]
        reversed_rows = backend.call(op, (features[None], selection), {})
        assert torch.equal(reversed_rows[0], features.flip(0))
    elif op == "aggregate_attention":
        heads = 8
        length = math.isqrt(elements // heads) + 1
        maps = torch.zeros(1, heads, length, length, device=device, dtype=dtype)
        assert maps.numel() >= elements
        maps[0, -1, -1] = torch.arange(length, device=device) % 7 + 1
        expected = maps[:, -1, -1, 1:].double() / (heads * length)
        torch.testing.assert_close(backend.call(op, (maps,), {}).double(), expected, rtol=2.0**-23, atol=0)
    else:
        total = math.isqrt(elements) + 1
        features = torch.randn(1, total, 16, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        similarity = backend.call(op, (features,), {})
        assert similarity.numel() >= elements
        last = min(64, total)
        ends = features[:, -last:]
        for rows, columns in ((slice(-last, None), slice(-last, None)), (slice(-last, None), slice(0, last))):
            other = features[:, columns]
            both = torch.cat([ends, other], 1)
            oracle, torch_own = numeric_oracle(op, (both,), {}), by_torch(op, (both,), {})
            block = slice(0, last), slice(last, 2 * last)
            assert_no_worse_than_torch(
                similarity[0, rows, columns], oracle[0][block], torch_own[0][block], f"columns {columns}"
            )
        assert torch.equal(similarity[0, -last:], similarity[0, :, -last:].T)


LARGE_IMAGE_OPS = ["aggregate_attention", "cosine_similarity", "gather_tokens"]


@pytest.mark.parametrize("op", LARGE_IMAGE_OPS)
def test_large_image_on_a_small_scale(op):
    check_large_image(op, CPU, 2**13)


@pytest.mark.slow
@pytest.mark.parametrize("backend", DEVICES, ids=str)
@pytest.mark.parametrize("op", LARGE_IMAGE_OPS)
def test_one_image_of_more_than_2_to_the_31_elements(op, backend):
    torch.cuda.empty_cache()
    check_large_image(op, backend, 2**31 + 1)


# Errors


def works(backend: Backend) -> bool:
    """Whether a kernel runs, to its end."""
    features = torch.arange(12.0, device=backend.device).reshape(1, 6, 2)
    kept = torch.tensor([[1, 5]], device=backend.device)
    return backend.call("gather_tokens", (features, kept), {}).tolist() == [[[2.0, 3.0], [10.0, 11.0]]]


@pytest.mark.parametrize("backend", [*DEVICES, CPU], ids=str)
def test_a_refused_argument_leaves_the_device_usable(backend):
    def to_device(x):
        return x if x.is_meta else x.to(backend.device)

    for op, args, kwargs, error, message in REJECTED:
        if "backend" in kwargs:
            continue
        message = message.replace("on cpu", f"on {torch.zeros(1, device=backend.device).device}")
        with pytest.raises(error) as caught:
            backend.call(op, map_tensors(args, to_device), map_tensors(kwargs, to_device))
        assert str(caught.value) == f"{op}: {message}"
        assert works(backend), message


@pytest.mark.parametrize("backend", DEVICES, ids=str)
def test_tensors_of_two_devices(backend):
    features, kept = torch.zeros(1, 6, 2, device="cuda"), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"gather_tokens: selection must be on cuda:0 like features, got int64 \(1, 2\)"
    ):
        backend.call("gather_tokens", (features, kept), {})
    assert works(backend)


@pytest.mark.parametrize("backend", DEVICES, ids=str)
def test_index_out_of_range_reads_nothing(backend):
    """What comes out is undefined, but neither an error nor other memory."""
    features = torch.ones(2, 5, 3, device="cuda")
    kept = torch.tensor([[0, 5], [-2, 2**62]], device="cuda")
    gathered = backend.call("gather_tokens", (features, kept), {})
    assert gathered[0, 0].tolist() == [1.0, 1.0, 1.0]
    assert works(backend)


@pytest.mark.parametrize("backend", DEVICES[:1], ids=str)
def test_sizes_beyond_a_gpu_are_refused(backend):
    scores = torch.rand(1, 512 * 512, device=backend.device)  # more than the shared memory of a block holds
    with pytest.raises((ValueError, RuntimeError), match=r"^hierarchical_select: "):
        backend.call("hierarchical_select", (scores,), {})
    assert works(backend)
    queries = torch.zeros(1, 1, 9, 300, device=backend.device)
    with pytest.raises(ValueError, match=r"^attention_importance: queries must be at most 256 wide"):
        backend.call("attention_importance", (queries, queries), {})
    assert works(backend)


@pytest.mark.parametrize("backend", DEVICES[:1], ids=str)
def test_error_of_a_launch_is_named(backend):
    """The launch goes to a stream whose capture was made to fail."""
    features = torch.ones(1, 4, 8, device=backend.device)
    kept = torch.zeros(1, 2, dtype=torch.int64, device=backend.device)
    out = torch.empty(1, 2, 8, device=backend.device)
    driver = ctypes.CDLL("libcuda.so.1")
    stream, graph = ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.cuStreamCreate(ctypes.byref(stream), 1) == 0  # non-blocking
    assert driver.cuStreamBeginCapture_v2(stream, 2) == 0  # relaxed: other threads are not watched
    assert driver.cuStreamSynchronize(stream) != 0
    with pytest.raises(RuntimeError, match=r"^gather_tokens: cudaError\w+: .+ \(.*gather_tokens\.cu:\d+\)$"):
        _native.C.cuda.gather_tokens(out, features, kept, 0.0, stream.value)
    assert driver.cuStreamEndCapture(stream, ctypes.byref(graph)) != 0
    assert driver.cuStreamDestroy_v2(stream) == 0
    assert works(backend)
