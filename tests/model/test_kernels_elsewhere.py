"""The kernels of other processors beside plain C++ on this one: kernels_elsewhere.cpp has the same hash in every case.

ARM's are cross-compiled and run by qemu. Other processors' of x86 are compiled for them, and run as far as this one can.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from bessemer.model import cpu_kernels as builds

KERNELS, DRIVER = Path(builds.__file__).parent, Path(__file__).parent / "kernels_elsewhere.cpp"
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
#: Optimised the compiler takes many times as long, and changes no bit.
QUICK, WHOLE = "-O0", "-O3"
#: What the driver says its arithmetic is, by the architecture that it is compiled for.
ARM = {
    "armv8-a": "neon",
    "armv8.2-a+dotprod": "neon_dotprod",
    "armv8.2-a+dotprod+i8mm": "neon_i8mm",
}


#: The kernels that products of matrices need, and the driver's flag that leaves the others out.
PRODUCTS = ("matrices", "quantised_product", "float_product", "parts", "blocks", "block_packing")
PRODUCTS_ALONE = "-DPRODUCTS_ALONE"


def compiled(folder, compiler, optimised, *options):
    """The driver and all kernels but PyTorch's operators, as one program."""
    wanted = PRODUCTS if PRODUCTS_ALONE in options else {path.stem for path in KERNELS.glob("*.cpp")} - {"operators"}
    sources = [str(KERNELS / f"{name}.cpp") for name in sorted(wanted)]
    program = folder / "driver"
    command = [compiler, *_without_processor(builds._OPTIONS, optimised), *options, "-static", f"-I{KERNELS}"]
    done = subprocess.run([*command, *sources, str(DRIVER), "-o", str(program)], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    return program


def _without_processor(options, optimised):
    return [optimised if one == "-O3" else one for one in options if not one.startswith("-march")]


def cases(*command):
    """The arithmetic, and the hash of every case."""
    done = subprocess.run([str(one) for one in command], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    (_, arithmetic), *hashes = (line.split() for line in done.stdout.splitlines())
    assert len(dict(hashes)) == len(hashes) > 80
    return arithmetic, dict(hashes)


def plain_cpp(folder, *options):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ (on Debian: apt-get install g++)")
    arithmetic, hashes = cases(compiled(folder, compiler, QUICK, "-march=native", "-DBESSEMER_PORTABLE", *options))
    assert arithmetic == "portable"
    return hashes


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What plain C++ gives on this machine."""
    return plain_cpp(tmp_path_factory.mktemp("plain"))


def needs_arm():
    for program, package in ((CROSS, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user")):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program} (on Debian: apt-get install {package})")


@pytest.mark.slow
def test_products_on_arm_have_the_bits_of_plain_cpp(tmp_path):
    needs_arm()
    newest = "armv8.2-a+dotprod+i8mm"
    plain = plain_cpp(tmp_path, PRODUCTS_ALONE)
    program = compiled(tmp_path, CROSS, QUICK, f"-march={newest}", PRODUCTS_ALONE)
    assert cases(EMULATOR, "-cpu", "max", program) == (ARM[newest], plain)


@pytest.mark.slow
@pytest.mark.parametrize("optimised", [QUICK, WHOLE])
@pytest.mark.parametrize("architecture", ARM)
def test_arm_has_the_bits_of_plain_cpp(architecture, optimised, plain, tmp_path):
    needs_arm()
    program = compiled(tmp_path, CROSS, optimised, f"-march={architecture}")
    assert cases(EMULATOR, "-cpu", "max", program) == (ARM[architecture], plain)


@pytest.mark.slow
def test_plain_cpp_on_arm_has_the_bits_of_plain_cpp_here(plain, tmp_path):
    needs_arm()
    program = compiled(tmp_path, CROSS, QUICK, "-march=armv8-a", "-DBESSEMER_PORTABLE")
    assert cases(EMULATOR, program) == ("portable", plain)


x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="these are processors of x86")


@x86
@pytest.mark.slow
@pytest.mark.parametrize("optimised", [QUICK, WHOLE])
@pytest.mark.parametrize("architecture", ["x86-64", "x86-64-v2"])
def test_x86_without_fused_multiplications_has_the_same_bits(architecture, optimised, plain, tmp_path):
    """Fused in float64, where std::fma is a call of the library."""
    program = compiled(tmp_path, "g++", optimised, f"-march={architecture}")
    assert cases(program) == ("portable", plain)


@x86
@pytest.mark.slow
@pytest.mark.parametrize("optimised", [QUICK, WHOLE])
def test_vnni_on_registers_of_avx2_has_the_same_bits(optimised, plain, tmp_path):
    """AVX-VNNI's instruction under AVX-512's encoding, which more processors have."""
    if not {"avx512_vnni", "avx512vl", "avx2", "fma", "f16c"} <= set(builds._processor_features()):
        pytest.skip("this processor has no VNNI on registers of 256 bits")
    program = compiled(tmp_path, "g++", optimised, "-march=native", "-DBESSEMER_VNNI_OF_256")
    assert cases(program) == ("avx_vnni", plain)


@x86
@pytest.mark.slow
def test_avx_vnni_compiles_and_runs_where_a_processor_has_it(plain, tmp_path):
    program = compiled(tmp_path, "g++", QUICK, "-march=x86-64-v3", "-mavxvnni")
    if "avx_vnni" not in builds._processor_features():
        pytest.skip("it compiles; this processor has no AVX-VNNI to run it")
    assert cases(program) == ("avx_vnni", plain)


@x86
@pytest.mark.slow
@pytest.mark.parametrize("options", [("-march=x86-64-v3",), ("-march=native",)], ids=["avx2", "native"])
def test_this_processor_has_the_bits_of_plain_cpp(options, plain, tmp_path):
    if "avx2" not in builds._processor_features():
        pytest.skip("this processor has no AVX2")
    assert cases(compiled(tmp_path, "g++", WHOLE, *options))[1] == plain


def test_a_library_on_arm_belongs_to_the_features_of_its_processor(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd asimddp i8mm\nCPU part\t: 0xd40\n", encoding="utf-8"
    )
    monkeypatch.setattr(builds, "Path", lambda _: cpuinfo)
    assert builds._processor_features() == ["asimd", "asimddp", "fp", "i8mm"]
