"""What kept_launch passes for a tensor that a kernel reads through a descriptor: what Triton would. It holds no tensor.

Triton's own wrapper takes descriptors apart; one in the form of Triton 3.6 stands beside it.
"""

from __future__ import annotations

import gc
import weakref

import pytest
from experts_support import layer

pytest.importorskip("triton")
from kept_launch_support import (  # noqa: E402
    BF16, GRID, ON_HOPPER, Kernel, check_second, describe, described, either_descriptor, either_form, keep, one_by_one,
    weights)

from kernel_registry import registry  # noqa: E402
from kernel_registry.ops.moe import kept_launch as module  # noqa: E402
from kernel_registry.ops.moe.experts import cases, grouped, triton_grouped  # noqa: E402
from kernel_registry.ops.moe.experts.launch import INTERPRETED  # noqa: E402
from tests import kept, launches  # noqa: E402
from tests.kept import vector  # noqa: E402

stream = kept.stream


@either_form
@either_descriptor
@pytest.mark.parametrize("place", [1, 3, 14])
def test_a_descriptor_is_passed_as_triton_passes_it(stream, form, descriptors, place):
    made, one, other = form(descriptors=descriptors), weights(), weights()
    launch = keep(made)
    launch(GRID, *described(one, place))
    for tensor in (one, other, one):
        check_second(made, launch, described(tensor, place))
    assert made.asked == 1


@either_form
def test_a_descriptor_is_encoded_once_for_an_address(stream, form):
    made, one, two, three = form(descriptors=ON_HOPPER), weights(), weights(), weights()
    launch = keep(made)
    launch(GRID, *described(one))
    stream.encoded.clear()
    for tensor in (one, two, one, two, three, one[:], two):
        launch(GRID, *described(tensor))
    assert [found.address for found in stream.encoded] == [tensor.data_ptr() for tensor in (one, two, three)]


@either_form
def test_so_many_descriptors_are_remembered(stream, form, monkeypatch):
    monkeypatch.setattr(module, "EXPANDED", 3)
    made, tensors = form(descriptors=ON_HOPPER), [weights() for _ in range(4)]
    launch = keep(made)
    launch(GRID, *described(tensors[0]))
    stream.encoded.clear()
    for i in (0, 1, 2, 0, 1, 2, 3, 3, 0, 3, 1):  # 3 is one too many, so it is remembered alone
        launch(GRID, *described(tensors[i]))
    assert [found.address for found in stream.encoded] == [tensors[i].data_ptr() for i in (0, 1, 2, 3, 0, 1)]
    for tensor in tensors * 2:
        check_second(made, launch, described(tensor))


@either_form
@either_descriptor
def test_no_tensor_is_held(stream, form, descriptors):
    """Weights that nobody else holds are freed, which a plain call's are too."""
    made, tensor, hidden = form(descriptors=descriptors), weights(), vector(BF16)
    launch, gone = keep(made), (weakref.ref(tensor), weakref.ref(hidden))
    for _ in range(3):
        launch(GRID, hidden, *described(tensor)[1:])
    assert made.asked == 1
    made.launched.clear()
    del tensor, hidden
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


@pytest.mark.parametrize("sizes", [dict(scratch=128), dict(profile_scratch=64)], ids=["scratch", "profile scratch"])
def test_an_allocation_beside_a_descriptor_takes_tritons_own_way(stream, sizes):
    made = Kernel(**sizes, descriptors=ON_HOPPER)
    launch = keep(made)
    for _ in range(3):
        launch(GRID, *described(weights()))
    assert made.asked == 3 and not made.launched
    compiled, = made.made.values()
    assert module.launcher(compiled, len(made.arg_names), 3, describe(weights())) is None


@pytest.mark.skipif(not INTERPRETED, reason="a layer's other kernels are interpreted")
@pytest.mark.parametrize("product, place", [("grouped_up", 1), ("grouped_down", 2)])
@pytest.mark.parametrize("experts", [(4, 8), (8, 4)], ids=str)
def test_layers_of_other_sizes_describe_their_own_weights(stream, monkeypatch, experts, product, place):
    """Layers whose constants are the same share a launch. The weights of a smaller one may begin where a larger one's
    do, or did."""
    made = kept.Kernel(getattr(grouped, product), {}, dict(num_warps=4, num_stages=1), descriptors=ON_HOPPER)
    monkeypatch.setattr(grouped, product, made)
    largest, _ = cases.inputs(layer(max(experts)), 1)
    for number in experts * 2:
        (hidden, _, _, *routing), _ = cases.inputs(layer(number), 1)
        asked, made.launched = made.asked, []
        run = triton_grouped.experts(**layer(number), platform=registry.platform())
        with launches.counted(monkeypatch):  # the other kernels compute nothing either
            run(hidden, *(weights[:number] for weights in largest[1:3]), *routing)
        maps = [one for _, passed in made.launched for one in one_by_one(passed) if isinstance(one, kept.TensorMap)]
        assert made.asked - asked + len(maps) == 1
        assert all((it.address, it.shape[0]) == (largest[place].data_ptr(), number) for it in maps)
    assert maps  # the last of them was a kept launch
