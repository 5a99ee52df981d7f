"""Where cells run: the GPUs that the sweep may use, and the threads of each cell."""

from __future__ import annotations

import os

import pytest

from stable_rlhf.evidence.devices import Place, places, visible_gpus

CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("given", "gpus"),
    [
        ("0", ["0"]),
        ("2, 5", ["2", "5"]),
        ("GPU-8932f937-d72c,MIG-41b3/1/0", ["GPU-8932f937-d72c", "MIG-41b3/1/0"]),
        ("", []),
        ("-1", []),
        ("1,-1,2", ["1"]),
        ("NoDevFiles", []),
    ],
)
def test_the_gpus_are_those_that_cuda_would_see(given: str, gpus: list[str]) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": given}) == gpus


def test_each_gpu_has_a_place_before_any_has_two() -> None:
    assert [place.gpu for place in places(2, ["4", "7"], {})] == ["4", "7", "4", "7"]


def test_places_share_the_cores_and_one_alone_leaves_them_to_torch() -> None:
    assert places(1, [], {}) == [Place(gpu=None, threads=None)]
    assert places(1, ["0"], {})[0].environment == {"CUDA_VISIBLE_DEVICES": "0"}
    two = places(2, [], {})
    assert two == [Place(gpu=None, threads=max(1, CORES // 2))] * 2
    assert two[0].environment == {"OMP_NUM_THREADS": str(max(1, CORES // 2))}
    assert {place.threads for place in places(1000, [], {})} == {1}


def test_a_number_of_threads_that_the_user_has_set_is_kept() -> None:
    assert places(4, [], {"OMP_NUM_THREADS": "3"})[0].environment == {}
