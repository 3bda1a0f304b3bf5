"""Small models compute on one of PyTorch's threads: several wait for each other longer than they compute."""

import pytest
import torch

from bessemer.model import cpu_kernels as builds
from bessemer.model import cpu_kernels as operators
from tests.cases import slow


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


#: An arithmetic that is not this processor's best, and how it is compiled: optimised, which changes no bit, the compiler takes
#: eight times as long.
_OTHERS = [("avx2", "-O0"), ("portable", "-O0"), ("avx2", "-O3"), ("portable", "-O3")]


@pytest.fixture(scope="module", params=[slow(one) if one[1] == "-O3" else one for one in _OTHERS], ids="".join)
def other_arithmetic(request):
    """The kernels with the instructions that another processor has."""
    name, optimised = request.param
    if builds.library() is None:
        pytest.skip(builds.unavailable())
    if name == "avx2" and not {"avx2", "fma", "f16c"} <= set(builds._processor_features()):
        pytest.skip("this processor has no AVX2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builds, "_OPTIONS", tuple(optimised if one == "-O3" else one for one in builds._OPTIONS))
        kernels = builds.build(arithmetic=name)
    assert kernels.bessemer_arithmetic().decode() == name
    return kernels


@pytest.fixture
def compute_elsewhere(other_arithmetic):
    """Has these kernels compute the operators until the test ends."""
    yield lambda: operators.compute_by(other_arithmetic)
    operators.compute_by(builds.library())
